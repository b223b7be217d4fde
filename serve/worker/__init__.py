"""The code of a worker process: images come in as jobs, predictions go out as answers.

`worker` is the process, `predictor` one of its threads, `batcher` the queue they take batches from.
`reload` and `version_check` follow the store's latest version, `drift_window` and `shadow` observe
completed batches.
"""
