"""Metrics: definitions, counters in shared memory, exposition, derived metrics."""
