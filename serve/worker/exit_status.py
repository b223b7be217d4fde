"""Exit statuses of processes that load a model, of workers, and of the check of a new version."""

MODEL_UNUSABLE = 2  # the model can't be loaded, and the process has reported why
HANGING = 3  # a predictor of a worker hangs; the images on which it hangs are answered
STORE_UNREADABLE = 75  # the store can't be read at the moment (EX_TEMPFAIL of sysexits.h)
