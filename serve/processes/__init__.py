"""The processes of the service: the supervisor, the HTTP processes, the adapter to LitServe.

`supervisor` is the first process. It starts worker processes (`serve.worker`), HTTP processes
(`http_process`, `serve.http`) and, if configured, a shadow process (`serve.worker.shadow`).
"""
