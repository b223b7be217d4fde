"""A progress bar of bytes, on a terminal only."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def byte_progress(
    title: str, total: int | None, completed: int = 0
) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr; yield a function that sets how many bytes are done.

    `total` is None where it is not known. Without a terminal nothing is printed.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(title, total=total, completed=completed)
        yield lambda done: progress.update(task, completed=done)
