"""A run: its directory, checkpoints, resume, preemption, processes, loggers and progress."""
