"""The error for bundles and stores that can't be trusted or read."""


class BundleError(ValueError):
    """A bundle or a store can't be trusted or read.

    The message is one line that names the file and the cause.
    """
