"""The cache of decoded pixels: one entry for each content, complete, and up to date."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from models.image import InputSpec
from support import ROOT
from support.sample_images import CLASSES, make_png, write_image_folder
from train.data import ImageData
from train.data.cache import DecodedImages, load_decoded_images
from train.data.source import FileItems

pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def ready(source: Path, cache: str) -> ImageData:
    data = ImageData(str(source), cache=cache, workers=0)
    data.setup()
    return data


def test_pixels_are_decoded_once_for_each_content(tmp_path, cache):
    source = write_image_folder(tmp_path / "photos")
    first = ready(source, cache)
    entries = sorted(path.name for path in Path(cache, "pixels").iterdir() if path.is_dir())
    for path in source.rglob("*.png"):
        path.touch()
    assert ready(source, cache).digest == first.digest
    assert sorted(path.name for path in Path(cache, "pixels").iterdir() if path.is_dir()) == entries
    (source / "red" / "000.png").write_bytes(make_png(2, 77))
    changed = ready(source, cache)
    assert changed.digest != first.digest
    assert not np.array_equal(changed.decoded.pixels, first.decoded.pixels)


@pytest.mark.parametrize("change_times", ["kept by the system", "one for all files"])
def test_a_change_that_keeps_size_and_modification_time_is_noticed(
    tmp_path, cache, monkeypatch, change_times
):
    """Archives restore modification times; read-only images have one time for all files."""
    source = write_image_folder(tmp_path / "photos", size=8)
    for path in source.rglob("*.png"):
        path.write_bytes(path.read_bytes().ljust(400, b"\0"))
        os.utime(path, (1, 1))

    if change_times == "one for all files":
        stat = os.stat

        def stat_of_image(path: Path, **options: bool) -> SimpleNamespace:
            status = stat(path, **options)
            return SimpleNamespace(
                st_mode=status.st_mode, st_size=status.st_size, st_mtime_ns=1, st_ctime_ns=1
            )

        monkeypatch.setattr("train.data.source.os.stat", stat_of_image)

    items = FileItems(source, [f"{name}/{i:03d}.png" for name in CLASSES for i in range(12)])
    before = items.fingerprint()
    assert items.fingerprint() == before
    (source / "red" / "000.png").write_bytes(make_png(2, 77, 8).ljust(400, b"\0"))
    os.utime(source / "red" / "000.png", (1, 1))
    assert items.fingerprint() != before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_that_grows_decodes_only_new_images(tmp_path, cache, workers):
    """Pixels that are changed in the cache show which of the images are copied from it."""
    source = write_image_folder(tmp_path / "photos", size=32)
    first = ready(source, cache)
    (entry,) = Path(cache, "pixels").glob("*/pixels.npy")
    kept = np.load(entry, mmap_mode="r+")
    kept[...] = 7
    kept.flush()

    (source / "red" / "000.png").unlink()
    (source / "red" / "new.png").write_bytes(make_png(2, 77, 32))
    grown = ImageData(str(source), cache=cache, workers=workers)
    grown.setup()

    names = [grown.dataset.items.name(i) for i in range(len(grown.dataset.items))]
    is_copied = (grown.decoded.pixels == 7).all((1, 2, 3))
    assert [name for name, copied in zip(names, is_copied, strict=True) if not copied] == [
        "red/new.png"
    ]
    row_of_digest = {record["sha256"].tobytes(): record for record in first.decoded.metadata}
    for name, record in zip(names, grown.decoded.metadata, strict=True):
        if name != "red/new.png":
            assert record == row_of_digest[record["sha256"].tobytes()]


def test_a_damaged_entry_is_decoded_again(tmp_path, cache):
    source = write_image_folder(tmp_path / "photos")
    before = np.array(ready(source, cache).decoded.pixels)
    for path in Path(cache).rglob("*.npy"):
        path.write_bytes(path.read_bytes()[:100])
    assert np.array_equal(ready(source, cache).decoded.pixels, before)


@pytest.mark.slow
def test_two_jobs_started_at_once_decode_once(tmp_path, cache):
    source = write_image_folder(tmp_path / "photos", count=60)
    script = (
        "import sys; from train.data import ImageData\n"
        "data = ImageData(sys.argv[1], cache=sys.argv[2], workers=1)\n"
        "data.setup()\nprint(data.digest)"
    )
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(source), cache],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    digests = {job.communicate(timeout=120)[0].strip() for job in jobs}
    assert [job.returncode for job in jobs] == [0, 0]
    assert len(digests) == 1
    assert len([path for path in Path(cache, "pixels").iterdir() if path.is_dir()]) == 1


@pytest.mark.slow
def test_leftovers_of_a_killed_job_are_removed(tmp_path, cache):
    source = write_image_folder(tmp_path / "photos", count=60)
    script = (
        "import os, signal, sys\nfrom train.data import ImageData\n"
        "from train.data.source import FileItems\n"
        "FileItems.__getitem__ = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "ImageData(sys.argv[1], cache=sys.argv[2], workers=0, size=32, channels=3,\n"
        "    significant_bits=16).setup()"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(source), cache], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert list(Path(cache, "pixels").glob(".staging-*"))
    ImageData(str(source), cache=cache, workers=0, size=32, channels=3).setup()
    assert not list(Path(cache, "pixels").glob(".staging-*"))


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, capsys):
    (tmp_path / "file").write_text("a file where a directory is needed")
    data = ready(write_image_folder(tmp_path / "photos"), str(tmp_path / "file" / "cache"))
    assert sum(data.counts.values()) == 36
    assert "memory only" in capsys.readouterr().err


class NetworkShare(FileItems):
    """Files whose first one can't be read at times, without a change of its fingerprint."""

    unavailable = True
    reads = 0

    def __getitem__(self, i: int) -> bytes:
        NetworkShare.reads += 1
        if i == 0 and self.unavailable:
            raise PermissionError(13, "Permission denied")
        return super().__getitem__(i)


def test_an_unreadable_file_is_tried_again(tmp_path, monkeypatch):
    source = write_image_folder(tmp_path / "photos")
    items = NetworkShare(
        source, sorted(p.relative_to(source).as_posix() for p in source.rglob("*.png"))
    )

    def load() -> DecodedImages:
        return load_decoded_images(
            items, InputSpec(height=32, width=32), tmp_path / "cache", 0, "Decoding"
        )

    assert "Permission denied" in load().metadata["problem"][0]
    before = NetworkShare.reads
    assert "Permission denied" in load().metadata["problem"][0]
    assert NetworkShare.reads == before + 1  # the others come from the cache
    monkeypatch.setattr(NetworkShare, "unavailable", False)
    loaded = load()
    assert (loaded.metadata["problem"] == "").all()
    assert loaded.pixels[0].any()
