"""The service's Prometheus metrics.

`definitions` lists the metrics. Each process counts in `shared_counters`, in shared memory. In the
supervisor, `collector` sums the counters of all processes, `derived_metrics` computes the metrics
that are not sums, and `exposition` answers `/metrics`.
"""
