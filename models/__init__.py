"""What training and serving must agree on: bytes to pixels, the bundle and its store, the networks."""
