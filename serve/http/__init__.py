"""The code of an HTTP process.

`app` is the ASGI app and the `Service` behind it, `protocol` the connection of one client.
`predict_request` answers POST /predict in the steps of `predict_endpoint`; `request_body` finds the
images, `dispatcher` sends them to the workers, `answer_cache` may answer them without a worker.
`http2_upgrade` handles clients that ask for HTTP/2. `responses` has the types that all share.

The other endpoints are `open_inference`, `feedback`, `openapi` and `page`. `tracing` records spans.
"""
