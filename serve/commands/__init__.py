"""Commands beside the service: `python -m serve predict | check | bench`."""
