"""The service's Prometheus metrics.

`definitions` says what is counted, `shared_counters` holds the numbers of one writer in shared
memory, `collector` sums them over all processes, `derived_metrics` computes what is not a sum, and
`exposition` answers `/metrics`.
"""
