"""The service: a bundle behind a batched HTTP API, on LitServe and onnxruntime. Never torch."""
