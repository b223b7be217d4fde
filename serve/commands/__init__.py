"""The commands of the service: `imago serve predict` and `imago serve check`."""
