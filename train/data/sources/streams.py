"""Data sets made for streaming, on disk or in an object store: LitData and Deep Lake."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from types import ModuleType

import numpy as np

from train.data.source import PARTS, DataError, Source, as_item, needs, numbered, part_name

IMAGES, LABELS = (
    ("image", "images", "img", "jpeg", "jpg", "png"),
    ("label", "labels", "class", "cls", "target"),
)


def litdata(place: str, cache: Path | None) -> Source:
    """What `litdata.optimize` wrote: a directory, or a URL such as s3://bucket/photos, with or without train/, val/ and
    test/ below it. An element is a mapping with an image (bytes, array or PIL image) and a label (number or name), or a
    pair of the two.

    Object stores are reached with what the environment holds (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …). The labels are
    read once, which reads everything once, and kept in `cache`.
    """
    package = needs("litdata", "litdata")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    if endpoint.startswith(
        "http:"
    ):  # a store in one's own cluster; its downloader knows no other way to be told
        from litdata.streaming import downloader

        getattr(downloader, "_OBSTORE_CLIENT_OPTIONS", {})["allow_http"] = True
    place = place.rstrip("/") if "://" in place else str(Path(place).expanduser())
    found = {part: chunks for part in PARTS if (chunks := _open_chunks(package, f"{place}/{part}"))}
    if "train" not in found:
        whole = _open_chunks(package, place)
        if whole is None:
            raise DataError(
                f"{place}: no index.json there nor in its train/; litdata.optimize writes one"
            )
        found = {"train": whole}
    labels = [label for chunks in found.values() for label in chunks.labels(cache)]
    classes, numbers = numbered(labels)
    parts = np.repeat(list(found), [len(chunks) for chunks in found.values()])
    return Source(place.rpartition("/")[2], classes, Joined(list(found.values())), numbers, parts)


def _open_chunks(package: ModuleType, place: str) -> "Chunks | None":
    """The data set at a place, or None where there is none."""
    if "://" not in place and not (Path(place) / "index.json").is_file():
        return None
    try:
        return Chunks(package, place)
    except Exception as error:  # each store's client raises its own
        if "index" in str(error) or "Not Found" in str(error) or "404" in str(error):
            return None
        raise DataError(
            f"{place}: not readable by litdata: {str(error).splitlines()[0]}"
        ) from error


class Chunks:
    """One LitData data set, opened anew in each process, because its readers are threads."""

    def __init__(self, package: ModuleType, place: str):
        self.place, self._opened = place, None
        self.size = sum(
            chunk["chunk_size"] for chunk in json.loads(self._index())["chunks"]
        )  # len() is one process's

    def _dataset(self):
        if self._opened is None or self._opened[0] != os.getpid():
            from litdata import StreamingDataset
            from litdata.streaming.serializers import BytesSerializer

            # JPEG files are handed over as they are: what decodes them is models.image
            dataset = StreamingDataset(self.place, serializers={"jpeg": BytesSerializer()})
            dataset[
                :0
            ]  # a slice, even an empty one, makes it fetch whole chunks from then on and keep them on disk
            self._opened = os.getpid(), dataset
        return self._opened[1]

    def __getstate__(self) -> dict:
        return {"place": self.place, "size": self.size, "_opened": None}

    def __len__(self) -> int:
        return self.size

    def _element(self, i: int) -> tuple[object, object]:
        """Image and label as they were written."""
        element = self._dataset()[int(i)]
        if not isinstance(element, dict):
            return element[0], element[1]
        try:
            return (
                next(element[name] for name in IMAGES if name in element),
                next(element[name] for name in LABELS if name in element),
            )
        except StopIteration:
            raise DataError(
                f"{self.place}: element {i} has {', '.join(element)}; an image and a label must be called "
                "so"
            ) from None

    def __getitem__(self, i: int) -> bytes | np.ndarray:
        return as_item(self._element(i)[0])

    def labels(self, cache: Path | None) -> list[str | None]:
        """Names of all elements' classes; remembered by what index.json says."""
        memory = cache and cache / "labels" / f"{self.fingerprint()[:32]}.json"
        if memory:
            with contextlib.suppress(OSError, ValueError):
                kept = json.loads(memory.read_text())
                if isinstance(kept, list) and len(kept) == self.size:
                    return kept
        values = (self._element(i)[1] for i in range(self.size))
        labels = [
            None if value is None else str(value.item() if hasattr(value, "item") else value)
            for value in values
        ]
        if memory:
            with contextlib.suppress(OSError):  # it only saves time
                memory.parent.mkdir(parents=True, exist_ok=True)
                staged = memory.with_name(f".{memory.name}-{os.getpid()}")
                staged.write_text(json.dumps(labels))
                staged.replace(memory)
        return labels

    def name(self, i: int) -> str:
        return f"{i:06d}"

    def _index(self) -> bytes:
        """What index.json says: each chunk with its bytes and its number of elements."""
        return (Path(self._dataset().input_dir.path) / "index.json").read_bytes()

    def fingerprint(self) -> str:
        """From the place and from its index."""
        return hashlib.sha256(self.place.encode() + self._index()).hexdigest()


class Joined:
    """Several LitData sets one after the other."""

    def __init__(self, pieces: list[Chunks]):
        self.pieces, self.ends = pieces, np.cumsum([len(piece) for piece in pieces])
        self.fork_safe = not any(
            "://" in piece.place for piece in pieces
        )  # what downloads runs threads of its own

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _at(self, i: int) -> tuple[Chunks, int]:
        k = int(np.searchsorted(self.ends, i, "right"))
        return self.pieces[k], i - (int(self.ends[k - 1]) if k else 0)

    def __getitem__(self, i: int) -> bytes | np.ndarray:
        piece, j = self._at(i)
        return piece[j]

    def name(self, i: int) -> str:
        return f"{i:06d}"

    def fingerprint(self) -> str:
        return hashlib.sha256(
            "".join(piece.fingerprint() for piece in self.pieces).encode()
        ).hexdigest()


def deeplake(place: str) -> Source:
    """A Deep Lake 4 data set: a directory or a URL that `deeplake.open` takes (s3://, gcs://, al://).

    The images are its column of type Image, or one called image; the labels its column of type ClassLabel, or one
    called label. A column called split names each row's part.
    """
    package = needs("deeplake", "deeplake")
    url = place if "://" in place else f"file://{Path(place).expanduser().resolve()}"
    try:
        dataset = package.open_read_only(url)
    except Exception as error:  # its errors share no base class
        raise DataError(
            f"{place}: not readable by deeplake: {str(error).splitlines()[0]}"
        ) from error
    kinds = {column.name: column.dtype.kind for column in dataset.schema.columns}
    image = _find(place, kinds, package.types.TypeKind.Image, IMAGES, "image")
    label = _find(place, kinds, package.types.TypeKind.ClassLabel, LABELS, "label")
    values = dataset[label][:]
    names = dict(dataset[label].metadata).get("class_names")
    if names:
        classes, labels = list(names), np.asarray(values, np.int64).reshape(-1)
    else:
        classes, labels = numbered(
            [str(value) for value in np.asarray(values).reshape(-1).tolist()]
        )
    parts = np.full(len(labels), "train")
    if "split" in kinds:
        parts = np.array([part_name(str(value)) or "" for value in dataset["split"][:]])
        if "" in parts:
            raise DataError(
                f"{place}: row {int(np.argmin(parts != ''))}: its split is none of train, val, test"
            )
    return Source(
        place.rstrip("/").rpartition("/")[2],
        classes,
        Lake(url, image, dataset.version),
        labels,
        parts,
    )


def _find(place: str, kinds: dict, kind: object, names: tuple[str, ...], what: str) -> str:
    found = [c for c, k in kinds.items() if k == kind] + [c for c in names if c in kinds]
    if not found:
        raise DataError(f"{place}: no {what} column; its columns are {', '.join(kinds)}")
    return found[0]


class Lake:
    """The image column of a Deep Lake data set, opened anew in each process."""

    def __init__(self, url: str, column: str, version: str):
        self.url, self.column, self.version, self._opened = url, column, version, None
        self.size = len(self._rows())

    def _rows(self):
        if self._opened is None or self._opened[0] != os.getpid():
            import deeplake

            dataset = deeplake.open_read_only(self.url)
            self._opened = (
                os.getpid(),
                dataset[self.column],
                dataset,
            )  # the column does not keep its data set alive
        return self._opened[1]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": None}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> bytes | np.ndarray:
        return as_item(self._rows().get_bytes(int(i)))

    def name(self, i: int) -> str:
        return f"{i:06d}"

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.url} {self.column} {self.version}".encode()).hexdigest()
