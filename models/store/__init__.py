"""The store: numbered versions of bundles and `latest`, in a directory or in a bucket."""

from models.store.cache import DEFAULT_MAX_BYTES, BundleCache
from models.store.errors import IncompleteVersion, StoreError
from models.store.layout import LATEST
from models.store.store import StagedVersion, Store

__all__ = [
    "DEFAULT_MAX_BYTES",
    "LATEST",
    "BundleCache",
    "IncompleteVersion",
    "StagedVersion",
    "Store",
    "StoreError",
]
