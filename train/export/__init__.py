"""Everything between the best weights of a run and a bundle in the store."""
