"""The processes of the service: the supervisor, what it starts, and the adapter to LitServe.

`supervisor` is the first process. It starts worker processes (`serve.worker`), HTTP processes
(`http_process`, `serve.http`) and, if configured, a shadow process (`serve.worker.shadow`).
"""
