"""The store: versions of bundles and `latest`."""

from models.store.local import LATEST, Staged, Store

__all__ = ["LATEST", "Staged", "Store"]
