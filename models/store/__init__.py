"""The store: versions of bundles and `latest`."""

from models.store.local import LATEST, StagedVersion, Store

__all__ = ["LATEST", "StagedVersion", "Store"]
