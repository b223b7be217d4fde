"""Engines: what runs the graph of a bundle."""
