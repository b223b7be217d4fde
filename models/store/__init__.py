"""The store: numbered versions of bundles, and `latest`, on a disk (local) or elsewhere (remote)."""

from models.store.local import LATEST, StagedVersion, Store

__all__ = ["LATEST", "StagedVersion", "Store"]
