"""The processes of the service: the supervisor, what it starts, and the adapter to LitServe."""
