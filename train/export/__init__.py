"""The steps from the best weights of a run to a bundle in the store, run by the first process."""
