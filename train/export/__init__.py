"""From the best weights to a bundle in the store."""
