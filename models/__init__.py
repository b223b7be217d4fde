"""What training and serving share: bytes to pixels, the bundle and its store, the networks."""

import os

# Newer builds of onnxruntime send usage data, also on Linux, and read these variables when they
# are imported. Imago switches this off, unless the environment sets them.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("ORT_TELEMETRY_DISABLED", "1")
