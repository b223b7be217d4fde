"""What training and serving share: bytes to pixels, the bundle and its store, the networks."""

import os

# Newer builds of onnxruntime send usage data, also from Linux, and decide so when they are
# imported. Imago switches that off, unless the environment says otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("ORT_TELEMETRY_DISABLED", "1")
