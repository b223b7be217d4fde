"""One module for each other server; `serve_rivals.py` runs them, each in its own environment."""
