"""Archives, URLs and buckets: fetched into the cache, then read as folders."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from models.store import object_storage
from support import RANDOM_CONVNET, ROOT
from support.file_server import FileServer, file_server
from support.s3_server import s3_server
from support.sample_images import CLASSES, make_png
from train.cli.main import main
from train.cli.recipes import default_model_name
from train.data import DataError, ImageData
from train.data.sources import archive as archive_module
from train.data.sources import bucket as bucket_module
from train.data.sources import download as download_module
from train.data.sources import open_source
from train.data.sources import remote as remote_module
from train.failures import DownloadFailed

COUNT = 4  # images of each class
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The directory that sources are fetched into, which may not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(download_module, "FIRST_RETRY_SECONDS", 0.001)
    return tmp_path / "cache/imago/fetched"


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    """Class folders: path -> PNG file."""
    return {
        f"{name}/{i:03d}.png": make_png(label, i)
        for label, name in enumerate(CLASSES)
        for i in range(COUNT)
    }


def write_zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return buffer.getvalue()


def write_tar(files: dict[str, bytes], *members: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
        for member in members:
            file.addfile(member)
    return buffer.getvalue()


def make_member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    member.linkname = target
    return member


def write_zip_link(files: dict[str, bytes], name: str, target: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for path, content in files.items():
            file.writestr(path, content)
        link = zipfile.ZipInfo(name)
        link.create_system = 3
        link.external_attr = 0o120777 << 16
        file.writestr(link, target)
    return buffer.getvalue()


def read(source: object, **options: Any) -> list[tuple[str, str, bytes]]:
    """Return (name, class, content) of each image of a source."""
    data = open_source(str(source), None, Path(os.environ["XDG_CACHE_HOME"]) / "imago", **options)
    return [
        (data.items.name(i), data.classes[data.labels[i]], bytes(data.items[i]))
        for i in range(len(data.items))
    ]


def expected(images: dict[str, bytes]) -> list[tuple[str, str, bytes]]:
    return [(path, path.split("/")[0], content) for path, content in sorted(images.items())]


def list_kept(cache: Path) -> list[str]:
    """Return what the cache holds besides locks: directories that were unpacked, partial files."""
    return sorted(path.name for path in cache.glob("*/*"))


# Archives


ARCHIVES: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "photos.zip": write_zip,
    "Photos.ZIP": write_zip,
    "photos.tar": write_tar,
    "photos.tar.gz": lambda files: gzip.compress(write_tar(files)),
    "photos.tgz": lambda files: gzip.compress(write_tar(files)),
    "photos.tar.bz2": lambda files: bz2.compress(write_tar(files)),
    "photos.tar.xz": lambda files: lzma.compress(write_tar(files)),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_is_read_like_the_folder_that_it_holds(tmp_path, images, name):
    files = {f"./photos/{path}": content for path, content in images.items()}
    files["__MACOSX/photos/blue/._000.png"] = b"resource fork"
    files["photos/.DS_Store"] = b"finder"
    (tmp_path / name).write_bytes(ARCHIVES[name](files))

    assert read(tmp_path / name) == expected(images)
    assert open_source(str(tmp_path / name), cache=tmp_path).name.lower() == "photos"


def test_an_archive_is_unpacked_once_and_again_where_it_has_changed(tmp_path, images, cache):
    path = tmp_path / "photos.zip"
    path.write_bytes(write_zip(images))
    assert read(path) == expected(images)
    (unpacked,) = cache.glob("*/archive-*")
    before = unpacked.stat().st_ino

    assert read(path) == expected(images)
    assert [directory.stat().st_ino for directory in cache.glob("*/archive-*")] == [before]

    fewer = {name: content for name, content in images.items() if not name.endswith("000.png")}
    path.write_bytes(write_zip(fewer))
    assert read(path) == expected(fewer)
    assert len(list(cache.glob("*/archive-*"))) == 1, "the older one is deleted"


def test_a_process_reads_on_where_another_has_unpacked_a_changed_archive(tmp_path, images, cache):
    """As a run does that streams its images."""
    path = tmp_path / "photos.zip"
    path.write_bytes(write_zip(images))
    running = open_source(str(path), None, tmp_path / "cache" / "imago")

    fewer = {name: content for name, content in images.items() if not name.endswith("000.png")}
    path.write_bytes(write_zip(fewer))
    assert read(path) == expected(fewer)
    assert [bytes(item) for item in running.items] == [images[name] for name in sorted(images)]

    del running
    path.write_bytes(write_zip(images))
    assert read(path) == expected(images)
    assert len(list(cache.glob("*/archive-*"))) == 1, "what no process reads is deleted"


def test_links_to_files_of_an_archive_are_kept(tmp_path, images):
    link = make_member("red/link.png", tarfile.SYMTYPE, "../blue/000.png")
    hard_link = make_member("red/hard.png", tarfile.LNKTYPE, "blue/001.png")
    (tmp_path / "photos.tar").write_bytes(write_tar(images, link, hard_link))
    found = {name: content for name, _, content in read(tmp_path / "photos.tar")}
    # As in a folder, a symbolic link is the same file, and a hard link another one.
    assert found == {**images, "red/hard.png": images["blue/001.png"]}


def test_names_of_a_zip_as_other_systems_write_them(tmp_path, images):
    files = {path.replace("blue/", "bl\u00fc/"): content for path, content in images.items()}
    content = write_zip({path.replace("/", "\\"): image for path, image in files.items()})
    # Without the flag that says UTF-8, as macOS writes it.
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        position = content.find(signature)
        while position >= 0:
            flags = struct.unpack_from("<H", content, position + offset)[0] & ~0x800
            at = position + offset
            content = content[:at] + struct.pack("<H", flags) + content[at + 2 :]
            position = content.find(signature, position + 4)
    (tmp_path / "photos.zip").write_bytes(content)
    assert {label for _, label, _ in read(tmp_path / "photos.zip")} == {"bl\u00fc", "green", "red"}


def test_a_table_in_an_archive_names_the_labels(tmp_path, images):
    flat = {path.replace("/", "-"): path.split("/")[0] for path in images}
    rows = "".join(f"images/{name},{label}\n" for name, label in flat.items())
    files = {f"set/images/{path.replace('/', '-')}": content for path, content in images.items()}
    files["set/labels.csv"] = f"path,label\n{rows}".encode()
    (tmp_path / "photos.zip").write_bytes(write_zip(files))
    assert sorted(label for _, label, _ in read(tmp_path / "photos.zip")) == sorted(flat.values())

    files["set/labels.csv"] = b"path,label\n/etc/passwd,blue\nimages/a.png,red\n"
    (tmp_path / "photos.zip").write_bytes(write_zip(files))
    with pytest.raises(DataError, match="/etc/passwd is outside the fetched data"):
        read(tmp_path / "photos.zip")


def encrypt(content: bytes) -> bytes:
    """Set the flag of encryption in all headers."""
    return content.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01")


def damage_header(content: bytes) -> bytes:
    """Overwrite the checksum of a header in the middle of a .tar."""
    position = content.index(b"red/000.png")
    return content[: position + 148] + b"99999999" + content[position + 156 :]


def damage_content(content: bytes) -> bytes:
    """Overwrite some bytes of the first file of a .zip."""
    return content[:100] + bytes(50) + content[150:]


def claim_size(files: dict[str, bytes]) -> bytes:
    """Write a .tar.gz with a file of a terabyte, by its header."""
    member = tarfile.TarInfo("red/large.png")
    member.size = 1 << 40
    return gzip.compress(write_tar(files, member))


def claim_zip_size(files: dict[str, bytes]) -> bytes:
    """Write a .zip whose directory names 4 GB for one file."""
    content = write_zip(files)
    position = content.index(b"PK\x01\x02") + 24
    return content[:position] + struct.pack("<I", 0xF0000000) + content[position + 4 :]


UNSAFE: dict[str, tuple[str, Callable[[dict[str, bytes]], bytes], str]] = {
    "absolute path": ("a.tar", lambda f: write_tar({**f, "/etc/x.png": b""}), "an absolute path"),
    "drive": ("a.zip", lambda f: write_zip({**f, "C:\\x.png": b""}), "an absolute path"),
    "above": ("a.zip", lambda f: write_zip({**f, "red/../../x.png": b""}), r"a path with \.\."),
    "folder above": (
        "a.tar",
        lambda f: write_tar(f, make_member("red/../..", tarfile.DIRTYPE)),
        r"a path with \.\.",
    ),
    "link out": (
        "a.tar",
        lambda f: write_tar(f, make_member("red/x.png", tarfile.SYMTYPE, "../../x.png")),
        "a link to ../../x.png",
    ),
    "absolute link": (
        "a.tar",
        lambda f: write_tar(f, make_member("red/x.png", tarfile.SYMTYPE, "/etc/passwd")),
        "a link to /etc/passwd",
    ),
    "link of a zip": (
        "a.zip",
        lambda f: write_zip_link(f, "red/x.png", "/etc/passwd"),
        "a link to /etc/passwd",
    ),
    "hard link out": (
        "a.tar",
        lambda f: write_tar(f, make_member("red/x.png", tarfile.LNKTYPE, "../x.png")),
        r"a path with \.\.",
    ),
    "link to a folder": (
        "a.tar",
        lambda f: write_tar(f, make_member("violet", tarfile.SYMTYPE, "red")),
        "a link to red, no file of the archive",
    ),
    "file through a link": (
        "a.tar",
        lambda f: write_tar(
            f, make_member("d", tarfile.SYMTYPE, "/tmp"), make_member("d/x.png", tarfile.REGTYPE)
        ),
        "a link to /tmp",
    ),
    "device": (
        "a.tar",
        lambda f: write_tar(f, make_member("red/x.png", tarfile.CHRTYPE)),
        "neither file, folder nor link",
    ),
    "password": ("a.zip", lambda f: encrypt(write_zip(f)), "protected by a password"),
    "long name": (
        "a.zip",
        lambda f: write_zip({**f, "red/" + 300 * "x": b"x"}),
        "can't be written",
    ),
    "cut zip": ("a.zip", lambda f: write_zip(f)[:-200], "a damaged archive"),
    "damaged zip": ("a.zip", lambda f: damage_content(write_zip(f)), "a damaged archive"),
    "cut tar": ("a.tar", lambda f: write_tar(f)[:5000], "a damaged archive"),
    "cut gzip": ("a.tgz", lambda f: gzip.compress(write_tar(f))[:-500], "a damaged archive"),
    "cut xz": ("a.txz", lambda f: lzma.compress(write_tar(f))[:-500], "a damaged archive"),
    "damaged tar": ("a.tar", lambda f: damage_header(write_tar(f)), "no valid header at byte"),
    "compressed text": ("a.tgz", lambda f: gzip.compress(b"text" * 300), "a damaged archive"),
    "web page": ("a.zip", lambda f: b"\n <!DOCTYPE html><html>", "a web page, not an archive"),
    "text": ("a.zip", lambda f: b"photos", "not a .zip or .tar archive"),
    "empty": ("a.tar", lambda f: b"", "not a .zip or .tar archive"),
    "bomb": ("a.tgz", claim_size, "unpacks to more than 200 times its size"),
    "zip bomb": ("a.zip", claim_zip_size, "unpacks to more than 200 times its size"),
    "no images": ("a.zip", lambda f: write_zip({"red/x.txt": b"x"}), r"a\.zip: no images"),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_an_unsafe_or_damaged_archive_is_refused_in_one_line(tmp_path, images, cache, case):
    name, write, message = UNSAFE[case]
    (tmp_path / name).write_bytes(write(images))
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / name)), "the archive, not the cache"
    if case != "no images":
        assert list_kept(cache) == [], "nothing half-written"
    assert not (tmp_path / "x.png").exists()


def test_an_archive_of_too_many_files_is_refused(tmp_path, images, monkeypatch):
    monkeypatch.setattr(archive_module, "MAX_MEMBERS", 3 * COUNT - 1)
    for name, write in (("photos.zip", write_zip), ("photos.tar", write_tar)):
        (tmp_path / name).write_bytes(write(images))
        with pytest.raises(DataError, match="more than 11 files"):
            read(tmp_path / name)


def test_an_archive_on_a_full_disk_ends_with_status_1(tmp_path, images, cache, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    (tmp_path / "photos.zip").write_bytes(write_zip(images))
    assert main(["audit", str(tmp_path / "photos.zip"), *RANDOM_CONVNET]) == 1
    error = capsys.readouterr().err.strip()
    assert "No space left on device to unpack" in error
    assert "\n" not in error
    assert list_kept(cache) == []


def test_a_source_that_is_fetched_needs_a_cache(tmp_path, images):
    (tmp_path / "photos.zip").write_bytes(write_zip(images))
    with pytest.raises(DataError, match=r"needs a cache.*--data.cache"):
        ImageData(str(tmp_path / "photos.zip"), cache="").setup()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"can't be written.*--data.cache"):
        ImageData(str(tmp_path / "photos.zip"), cache=str(tmp_path / "file")).setup()


# https://


@pytest.fixture(scope="module")
def running_server() -> Iterator[FileServer]:
    with file_server() as server:
        yield server


@pytest.fixture
def server(running_server: FileServer, images: dict[str, bytes]) -> FileServer:
    """A server of /photos.zip that behaves."""
    running_server.files = {"/photos.zip": write_zip(images)}
    running_server.statuses = {}
    running_server.requests = []
    running_server.bytes_before_break = None
    running_server.has_validators = True
    running_server.before_body = lambda: None
    return running_server


def test_an_archive_at_a_url_is_downloaded_once(server, images):
    url = f"{server.url}/photos.zip"
    assert read(url) == expected(images)
    assert read(url) == expected(images)
    assert server.ranges() == [None, None], "the second one compares the version"


def test_a_download_that_breaks_off_continues_where_it_stopped(server, images):
    content = server.files["/photos.zip"]
    server.bytes_before_break = len(content) // 3
    assert read(f"{server.url}/photos.zip") == expected(images)
    step = len(content) // 3
    assert server.ranges() == [None, *(f"bytes={i}-" for i in range(step, len(content), step))]


def test_the_next_run_continues_a_download_that_keeps_breaking_off(server, images, capsys):
    url = f"{server.url}/photos.zip?token=secret"
    server.bytes_before_break = 1000
    server.before_body = lambda: server.statuses.update({"/photos.zip": 503})
    assert main(["audit", url, *RANDOM_CONVNET]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    size = len(server.files["/photos.zip"])
    assert f"/photos.zip: the download broke off after 1,000 of {size:,} bytes" in error
    assert "503" in error
    assert "secret" not in error

    server.statuses = {}
    server.bytes_before_break = None
    server.requests = []
    assert read(url) == expected(images)
    assert server.ranges() == ["bytes=1000-"]


@pytest.mark.parametrize("tells_its_size", [True, False])
def test_a_disk_that_is_full_during_a_download_ends_with_status_1(
    server, images, cache, capsys, tells_its_size
):
    """A limit on the size of a file acts like a full disk: the first write takes a part."""
    url = f"{server.url}/photos.zip?token=secret"
    server.has_validators = tells_its_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(server.files["/photos.zip"]) // 2, hard))
    try:
        status = main(["audit", url, *RANDOM_CONVNET])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    error = capsys.readouterr().err.strip()
    assert status == 1
    assert re.search(
        r"File too large to fetch .*/photos\.zip; free some space, or set --data", error
    )
    assert "\n" not in error
    assert "secret" not in error
    assert list_kept(cache) == []
    assert read(url) == expected(images)


def test_a_file_that_changes_during_a_download_starts_over(server, images):
    fewer = {name: content for name, content in images.items() if not name.endswith("000.png")}
    server.bytes_before_break = 1000

    def change() -> None:
        server.files["/photos.zip"] = write_zip(fewer)
        server.bytes_before_break = None if len(server.requests) > 1 else 1000

    server.before_body = change
    assert read(f"{server.url}/photos.zip") == expected(fewer)
    assert server.ranges() == [None, "bytes=1000-"]


def test_a_signal_ends_a_download_and_the_next_run_continues_it(commands, server, images, tmp_path):
    url = f"{server.url}/photos.zip"
    is_requested = threading.Event()
    is_ended = threading.Event()
    server.bytes_before_break = 1000

    def hold_second_request() -> None:
        if len(server.requests) == 2:
            is_requested.set()
            assert is_ended.wait(120)

    server.before_body = hold_second_request
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = commands.start("audit", url, *RANDOM_CONVNET, env=environment)
    assert is_requested.wait(120), command.text
    command.send_signal(signal.SIGTERM)
    assert command.status() == 143, command.text
    is_ended.set()

    server.bytes_before_break = None
    server.requests = []
    assert read(url) == expected(images)
    assert server.ranges() == ["bytes=1000-"]


def test_a_server_without_versions_starts_over(server, images):
    server.has_validators = False
    server.bytes_before_break = 1000

    def stop_breaking() -> None:
        server.bytes_before_break = None if len(server.requests) > 1 else 1000

    server.before_body = stop_breaking
    assert read(f"{server.url}/photos.zip") == expected(images)
    assert server.ranges() == [None, None]


def test_a_complete_download_is_not_repeated_where_unpacking_was_interrupted(
    server, images, monkeypatch
):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(remote_module, "unpack_archive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            read(f"{server.url}/photos.zip")
    server.requests = []
    assert read(f"{server.url}/photos.zip") == expected(images)
    size = len(server.files["/photos.zip"])
    assert server.ranges() == [f"bytes={size}-"], "the server has nothing to add"


def test_a_changed_archive_is_downloaded_again(server, images, cache):
    url = f"{server.url}/photos.zip"
    assert read(url) == expected(images)
    fewer = {name: content for name, content in images.items() if not name.endswith("000.png")}
    server.files["/photos.zip"] = write_zip(fewer)

    assert read(url, refresh=False) == expected(images), "the other processes of a run"
    assert len(server.requests) == 1
    assert read(url) == expected(fewer)
    assert len(list(cache.glob("*/archive-*"))) == 1


def test_what_was_fetched_is_used_where_the_server_is_gone(images, capsys):
    with file_server() as server:
        server.files["/photos.zip"] = write_zip(images)
        url = f"{server.url}/photos.zip"
        assert read(url) == expected(images)
    assert read(url) == expected(images)
    assert "can't be reached" in capsys.readouterr().err


def test_one_of_two_processes_fetches_and_the_other_waits(server, images, monkeypatch):
    url = f"{server.url}/photos.zip"
    is_waiting = threading.Event()
    is_requested = threading.Event()
    monkeypatch.setattr(remote_module, "notify", lambda line: is_waiting.set())

    def hold() -> None:
        is_requested.set()
        assert is_waiting.wait(60)

    server.before_body = hold
    results = []
    threads = [threading.Thread(target=lambda: results.append(read(url))) for _ in range(2)]
    threads[0].start()
    assert is_requested.wait(60)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert results == [expected(images)] * 2
    assert server.ranges() == [None, None]


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/nowhere.zip", None, "the server answers 404 Not Found; check the address"),
        ("/photos.zip", 403, "access denied: the server answers 403"),
        ("/page.zip", None, "a web page, not an archive"),
        ("/broken.zip", None, "a damaged archive"),
        ("/photos.zip", 500, "can't be reached: the server answers 500"),
    ],
)
def test_a_url_without_an_archive_is_refused_in_one_line(
    server, cache, capsys, path, status, message
):
    server.files["/page.zip"] = b"<html>" + bytes(2000)
    server.files["/broken.zip"] = server.files["/photos.zip"][:-100]
    server.statuses = {path: status} if status else {}
    assert main(["audit", f"{server.url}{path}", *RANDOM_CONVNET]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"train: {server.url}{path}: ")
    assert message in error
    assert "\n" not in error
    assert list_kept(cache) == []


def test_a_host_that_is_not_there_is_reported_in_one_line(cache):
    with pytest.raises(DataError, match=r"can't be reached.*check the address and the network"):
        read("http://127.0.0.1:9/photos.zip")
    assert list_kept(cache) == []


def test_a_user_name_and_password_are_sent_to_the_server_only(server, images, cache):
    url = server.url.replace("//", "//me:pass%20word@") + "/photos.zip?signature=" + 300 * "a"
    data = ImageData(url)
    data.setup()
    assert data.source == f"{server.url}/photos.zip"
    assert data.dataset.name == "photos"
    assert server.requests[0].headers["Authorization"] == "Basic bWU6cGFzcyB3b3Jk"
    for path in cache.rglob("*.json*"):
        assert "signature" not in path.read_text()


# Buckets


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    with s3_server("photos") as client:
        yield client


@pytest.fixture
def prefix(s3, images, request) -> str:
    """A new prefix of the bucket with class folders."""
    name = f"sets/{request.node.name[:40]}"
    for path, content in images.items():
        s3.put_object(Bucket="photos", Key=f"{name}/{path}", Body=content)
    return name


def test_a_prefix_of_a_bucket_is_mirrored(s3, prefix, images, cache):
    for key in ("red/", ".hidden/a.png", "red/notes.txt"):
        s3.put_object(Bucket="photos", Key=f"{prefix}/{key}", Body=b"")
    s3.put_object(Bucket="photos", Key=f"{prefix}-other/red/a.png", Body=b"")
    url = f"s3://photos/{prefix}/"
    assert read(url) == expected(images)
    files = next(cache.glob("*/files"))
    before = {path: path.stat().st_ino for path in files.rglob("*.png")}

    s3.delete_object(Bucket="photos", Key=f"{prefix}/red/000.png")
    s3.put_object(Bucket="photos", Key=f"{prefix}/red/001.png", Body=images["blue/000.png"])
    s3.put_object(Bucket="photos", Key=f"{prefix}/red/n\u00e9w #1.png", Body=images["red/000.png"])
    changed = {
        **images,
        "red/001.png": images["blue/000.png"],
        "red/n\u00e9w #1.png": images["red/000.png"],
    }
    del changed["red/000.png"]
    assert read(url, refresh=False) == expected(images)
    assert read(url) == expected(changed)

    kept = [
        path for path, number in before.items() if path.exists() and path.stat().st_ino == number
    ]
    assert len(kept) == len(images) - 2, "the others are not fetched again"
    lines = (files.parent / "objects.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)[0] for line in lines) == sorted(changed)


def test_a_mirror_that_was_interrupted_continues_with_what_is_missing(prefix, images, monkeypatch):
    fetch_object = bucket_module.Bucket.fetch_object
    fetched: list[str] = []

    def fetch_some(bucket: Any, path: str, target: Path) -> object:
        if "red" in path:
            raise download_module.ConnectionLost("cut")
        fetched.append(path)
        return fetch_object(bucket, path, target)

    url = f"s3://photos/{prefix}"
    with monkeypatch.context() as patch:
        patch.setattr(bucket_module.Bucket, "fetch_object", fetch_some)
        with pytest.raises(DownloadFailed, match=r"broke off.*cut; run the same command again"):
            read(url)
    assert len(fetched) == 2 * COUNT

    def fetch_rest(bucket: Any, path: str, target: Path) -> object:
        assert "red" in path
        return fetch_object(bucket, path, target)

    monkeypatch.setattr(bucket_module.Bucket, "fetch_object", fetch_rest)
    assert read(url) == expected(images)


def test_a_mirror_is_used_where_the_bucket_is_out_of_reach(prefix, images, monkeypatch, capsys):
    url = f"s3://photos/{prefix}"
    assert read(url) == expected(images)
    monkeypatch.setitem(object_storage.RETRIES, "max_retries", 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert read(url) == expected(images)
    assert "can't be listed" in capsys.readouterr().err
    with pytest.raises(DataError, match="can't be listed"):
        read("s3://photos/others")


@pytest.mark.parametrize("name", ["photos.tar.gz", "archive"])
def test_an_archive_in_a_bucket_is_fetched_in_blocks(s3, images, monkeypatch, name):
    monkeypatch.setattr(bucket_module, "BLOCK_BYTES", 1000)
    content = gzip.compress(write_tar(images))
    assert len(content) > 10_000
    s3.put_object(Bucket="photos", Key=name, Body=content)
    assert read(f"s3://photos/{name}") == expected(images)
    assert read(f"s3://photos/{name}") == expected(images)


def test_keys_of_the_users_profile_open_a_bucket(prefix, images, tmp_path, monkeypatch):
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION", "ENDPOINT_URL"):
        monkeypatch.delenv(f"AWS_{name}")
    (tmp_path / "config").write_text(
        f"[profile me]\nendpoint_url = {endpoint}\nregion = eu-west-1\n"
    )
    (tmp_path / "credentials").write_text(
        "[me]\naws_access_key_id = a\naws_secret_access_key = b\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "me")
    assert read(f"s3://photos/{prefix}") == expected(images)

    monkeypatch.setenv("AWS_PROFILE", "you")
    with pytest.raises(DataError, match=r"no profile 'you'.*check AWS_PROFILE"):
        read(f"s3://photos/{prefix}")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://", "no bucket; write s3://bucket/path"),
        ("s3://not-there/photos", "no such bucket"),
        ("s3://not-there/photos.zip", "no such bucket|nothing there"),
        ("s3://photos/nothing", "nothing there"),
        ("s3://photos/nothing.zip", "nothing there"),
        ("s3://photos/texts", "1 objects, but no images"),
    ],
)
def test_a_bucket_without_images_is_refused_in_one_line(s3, cache, url, message):
    s3.put_object(Bucket="photos", Key="texts/a.txt", Body=b"a")
    with pytest.raises(DataError, match=message) as caught:
        read(url)
    assert "\n" not in str(caught.value)
    assert list_kept(cache) == []


def test_a_bucket_without_credentials_says_which_to_set(s3, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")  # no machine of the cloud
    with pytest.raises(DataError, match=r"no credentials.*set AWS_ACCESS_KEY_ID") as caught:
        read("s3://photos/sets")
    assert "\n" not in str(caught.value)


# Commands


def test_a_run_records_a_url_without_its_secrets(server, tmp_path):
    url = f"{server.url}/photos.zip?signature=secret"
    settings = (*RANDOM_CONVNET, "--data.size=32", "--trainer.max_epochs=1")
    runs = tmp_path / "runs"
    arguments = ["run", url, *settings, "--export.enabled=false", "--audit.enabled=false"]
    assert main([*arguments, f"--trainer.default_root_dir={runs}"]) == 0
    assert (runs / "photos/1").is_dir()
    for path in runs.rglob("*.*"):
        assert path.is_dir() or b"signature" not in path.read_bytes()
    source = yaml.safe_load((runs / "photos/1/config.yaml").read_text())["data"]["source"]
    assert source == f"{server.url}/photos.zip"


def test_make_passes_a_url_on_as_it_is():
    url = "https://host/a%20b.zip?a=1&b=~x;c#d"
    command = ["make", "--dry-run", "train", f"DATA={url}"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f'train run "{url}" --store' in printed


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/data/Photos.tar.gz", "photos"),
        ("https://host/a/my%20photos.zip?download=1#x", "my-photos"),
        ("s3://bucket/flowers/", "flowers"),
        ("s3://bucket", "bucket"),
        ("gs://bucket/sets/birds.v2.tgz", "birds.v2"),
        ("hf://datasets/owner/beans", "beans"),
        ("litdata:s3://bucket/set", "set"),
    ],
)
def test_a_model_is_named_like_the_last_component_of_its_data(source, name):
    assert default_model_name(source) == name
