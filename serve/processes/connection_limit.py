"""Fit the limit of connections to the system's limit of open files."""

import resource

from serve import logs
from serve.http.protocol import EXTRA_CONNECTIONS
from serve.settings import Settings

OTHER_OPEN_FILES = 128  # of a process, besides the connections of clients


def limit_connections(settings: Settings) -> Settings:
    """Raise the limit of open files to what `max_connections` needs.

    Return the settings, with fewer `max_connections` if the system allows no more. A connection
    above `max_connections` gets a response with status 503. One above the system's limit would get
    none.
    """
    other = OTHER_OPEN_FILES + EXTRA_CONNECTIONS
    open_files = raise_open_file_limit(settings.max_connections + other)
    possible = max(1, open_files - other)
    if possible >= settings.max_connections:
        return settings

    logs.logger.warning(
        "max_connections is %d, not %d: the limit of open files (ulimit -n) is too low",
        possible,
        settings.max_connections,
    )
    return settings.model_copy(update={"max_connections": possible})


def raise_open_file_limit(wanted: int) -> int:
    """Let this process and its children open `wanted` files. Return the limit that is now set."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    if soft >= wanted:
        return soft

    raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    return raised
