"""The steps from the best weights of a run to a bundle in the store, run by the first process."""

import models.networks  # noqa: F401  (first: declares operators torchvision needs on a CPU torch)
