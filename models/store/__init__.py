"""The store: numbered versions of bundles and `latest`, on a disk or at a URL."""

from models.store.local import LATEST, StagedVersion, Store

__all__ = ["LATEST", "StagedVersion", "Store"]
