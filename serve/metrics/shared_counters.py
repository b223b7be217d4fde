"""The numbers of one writer, in a file in shared memory.

Each thread or process that counts owns one file `<run directory>/<writer>.metrics`. A file has a
single writer, so counting needs no lock and costs well under a microsecond. A replaced worker
continues the file of its predecessor, so counters never fall. `serve.metrics.collector` sums over
the files.

Layout, aligned to 8 bytes: an int64 with the bytes in use, then entries. An entry is an int64 with
the length of its key, the key (JSON `[name, labels]`, padded with spaces), and the numbers as
doubles. A counter or gauge has one number. A histogram has one count per bucket, one for values
above the last bucket, and the sum of all values.
"""

import json
import mmap
import os
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator

import numpy as np

from serve.metrics.definitions import METRICS, Definition

INITIAL_BYTES = 1 << 16
_INT64 = struct.Struct("<q")


class SharedCounters:
    """Counts the metrics of `serve.metrics.definitions` in the file of one writer.

    The file grows with its entries. Two maps of one file, of different lengths, share the same
    memory, so a process may keep using a map that another process has since outgrown.
    """

    def __init__(self, path: str):
        self.path = path
        self._map_file(INITIAL_BYTES)

        self.slots: dict[tuple[str, tuple[str, ...]], int] = {}
        for name, labels, index in read_entries(self.map):
            self.slots[name, labels] = index

        (used,) = _INT64.unpack_from(self.map, 0)
        self.used = max(_INT64.size, used)

    def _map_file(self, capacity: int) -> None:
        """Map the file, grown to at least `capacity` bytes."""
        with open(self.path, "a+b") as file:
            if os.fstat(file.fileno()).st_size < capacity:
                pages = -(-capacity // mmap.PAGESIZE)
                file.truncate(pages * mmap.PAGESIZE)
            self.map = mmap.mmap(file.fileno(), 0)

        self.values = memoryview(self.map).cast("d")

    def slot(self, name: str, *labels: str) -> int:
        """Return the index of a series' first number in `values`; the first call creates it.

        Creating a series may replace `values`, so read that attribute after this call.
        """
        key = (name, labels)
        if key not in self.slots:
            self.slots[key] = self._append_entry(name, labels)
        return self.slots[key]

    def _append_entry(self, name: str, labels: tuple[str, ...]) -> int:
        text = json.dumps([name, labels]).encode()
        text += b" " * (-len(text) % 8)

        key_start = self.used + _INT64.size
        numbers_start = key_start + len(text)
        end = numbers_start + 8 * count_numbers(METRICS[name])
        if end > len(self.map):
            self._map_file(2 * end)

        _INT64.pack_into(self.map, self.used, len(text))
        self.map[key_start:numbers_start] = text
        # The size changes last, so that readers see complete entries only.
        _INT64.pack_into(self.map, 0, end)
        self.used = end
        return numbers_start // 8

    def add(self, name: str, *labels: str, by: float = 1) -> None:
        """Increase a counter or gauge."""
        index = self.slot(name, *labels)
        self.values[index] += by

    def set(self, name: str, *labels: str, to: float) -> None:
        """Set a gauge."""
        index = self.slot(name, *labels)
        self.values[index] = to

    def setter(self, name: str) -> Callable[[float], None]:
        """Return a function that sets the gauge `name`."""
        index = self.slot(name)

        def set_value(value: float) -> None:
            self.values[index] = value

        return set_value

    def observe(self, name: str, value: float) -> None:
        """Add one value to a histogram."""
        index = self.slot(name)
        buckets = METRICS[name].buckets
        self.values[index + bisect_left(buckets, value)] += 1
        self.values[index + len(buckets) + 1] += value

    def observe_all(self, name: str, values: np.ndarray) -> None:
        """Add an array of values to a histogram."""
        index = self.slot(name)
        buckets = METRICS[name].buckets
        positions = np.searchsorted(buckets, values)
        counts = np.bincount(positions, minlength=len(buckets) + 1)
        for position, count in enumerate(counts.tolist()):
            if count:
                self.values[index + position] += count
        self.values[index + len(buckets) + 1] += float(values.sum())


def count_numbers(definition: Definition) -> int:
    """Return how many doubles one series of a metric takes."""
    if definition.kind == "histogram":
        return len(definition.buckets) + 2
    return 1


def read_entries(data: bytes | mmap.mmap) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Yield the name, the labels and the index of the first double of each entry of a file."""
    (used,) = _INT64.unpack_from(data, 0)
    offset = _INT64.size
    while offset < used:
        (length,) = _INT64.unpack_from(data, offset)
        offset += _INT64.size
        name, labels = json.loads(data[offset : offset + length])
        offset += length
        yield name, tuple(labels), offset // 8
        offset += 8 * count_numbers(METRICS[name])
