"""The errors for a store that can't be used, and for a version that is not whole yet."""

from models.bundle import BundleError


class StoreError(BundleError):
    """The store itself can't be used: out of reach, no access, or no such bucket.

    This says nothing about its bundles, so a service keeps the one that it has. `may_pass` is true
    for what a later attempt may not meet, such as a connection that breaks.
    """

    def __init__(self, message: str, may_pass: bool = False):
        super().__init__(message)
        self.may_pass = may_pass


class IncompleteVersion(BundleError):
    """A version in a bucket that lacks objects, as one that is being copied by other means."""
