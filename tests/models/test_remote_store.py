"""`push` and `pull` over several file systems of fsspec, also when the connection breaks."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from models.__main__ import main
from models.bundle import Bundle
from models.store import Store
from support import tiny_bundle
from support.s3_server import s3_server

URL = "memory://bucket/store"


@pytest.fixture(autouse=True)
def empty_bucket():
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    Breaking.left = 1 << 30


def run(store: Path, *arguments: str) -> int:
    return main([*arguments, "--store", str(store)])


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """Return a store with colours/1 and colours/2."""
    tiny_bundle.publish(tmp_path / "local")
    tiny_bundle.publish(tmp_path / "local")
    return tmp_path / "local"


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Return the URL of an empty store in each kind of file system."""
    if request.param == "s3":
        with s3_server("bucket"):
            yield "s3://bucket/store"
    else:
        yield URL if request.param == "memory" else f"file://{tmp_path}/far"


def test_push_and_pull(local, tmp_path, url, capsys):
    other = tmp_path / "other"
    assert run(local, "push", "colours", "1", url) == 0
    assert run(local, "push", "colours", url) == 0
    assert f"pushed to {url}/colours/2" in capsys.readouterr().out
    assert run(other, "pull", "colours", url) == 0
    assert Store(other).versions("colours") == [2]
    assert Store(other).latest("colours") == 2
    assert run(other, "pull", "colours", "1", url) == 0
    assert Store(other).latest("colours") == 2
    assert Bundle(other / "colours" / "1").digest == Bundle(local / "colours" / "1").digest


def test_latest_of_a_bucket_can_be_a_copy_of_the_version(local, tmp_path):
    """As `aws s3 sync` leaves it, which follows links."""
    bucket = fsspec.filesystem("memory")
    for path in local.rglob("*"):
        if path.is_file():
            bucket.put_file(str(path), f"/bucket/store/{path.relative_to(local)}")
    latest = local / "colours" / "latest"
    for path in latest.resolve().rglob("*"):
        if path.is_file():
            file = path.relative_to(latest.resolve())
            bucket.put_file(str(path), f"/bucket/store/colours/latest/{file}")
    assert run(tmp_path / "other", "pull", "colours", URL) == 0
    assert Store(tmp_path / "other").latest("colours") == 2


def test_a_second_copy_does_nothing(local, tmp_path, capsys):
    for message in ("pushed to", "already at"):
        assert run(local, "push", "colours", URL) == 0
        assert message in capsys.readouterr().out
    for message in ("pulled to", "already at"):
        assert run(tmp_path / "other", "pull", "colours", URL) == 0
        assert message in capsys.readouterr().out


def test_another_bundle_under_the_same_version_is_refused(local, tmp_path, capsys):
    assert run(local, "push", "colours", "1", URL) == 0
    other = tmp_path / "other"
    tiny_bundle.publish(other, scale=2)
    assert run(other, "push", "colours", URL) == 2
    assert f"{URL}/colours/1: exists already with other contents" in capsys.readouterr().err
    assert run(other, "pull", "colours", URL) == 2
    assert "has other contents than" in capsys.readouterr().err


def test_a_broken_bundle_is_not_pushed(local, capsys):
    (local / "colours" / "2" / "model.onnx").write_bytes(b"torn")
    assert run(local, "push", "colours", URL) == 2
    assert "model.onnx: changed since" in capsys.readouterr().err
    assert not MemoryFileSystem.store


def test_a_version_changed_in_the_bucket_is_not_pulled(local, tmp_path, capsys):
    assert run(local, "push", "colours", URL) == 0
    fsspec.filesystem("memory").pipe_file("/bucket/store/colours/2/samples/00.png", b"torn")
    assert run(tmp_path / "other", "pull", "colours", URL) == 2
    assert "samples/00.png: changed since" in capsys.readouterr().err
    assert Store(tmp_path / "other").versions("colours") == []


def test_paths_outside_the_bundle_are_not_pulled(local, tmp_path, capsys):
    assert run(local, "push", "colours", URL) == 0
    sums = "/bucket/store/colours/2/SHA256SUMS"
    bucket = fsspec.filesystem("memory")
    bucket.pipe_file(sums, bucket.cat_file(sums) + f"{'0' * 64}  ../../../evil\n".encode())
    assert run(tmp_path / "other", "pull", "colours", URL) == 2
    assert "'../../../evil' points outside the bundle" in capsys.readouterr().err
    assert not (tmp_path / "evil").exists()


class Breaking(MemoryFileSystem):
    """A memory file system that fails after a number of files, or loses bytes in transfer."""

    protocol = "breaking"
    cachable = False
    left = 1 << 30
    loses = False

    @classmethod
    def _use(cls) -> None:
        cls.left -= 1
        if cls.left < 0:
            raise ConnectionResetError("connection reset by peer\nmore of it")

    def put_file(self, lpath, rpath, **kwargs):
        self._use()
        super().put_file(lpath, rpath, **kwargs)
        if self.loses:
            self.pipe_file(rpath, self.cat_file(rpath)[:-1])

    def get_file(self, rpath, lpath, **kwargs):
        self._use()
        super().get_file(rpath, lpath, **kwargs)


fsspec.register_implementation("breaking", Breaking, clobber=True)
BREAKING_URL = "breaking://bucket/store"


@pytest.mark.parametrize("files", [0, 1, 5, 18])
def test_an_interrupted_push_is_invisible_and_can_be_repeated(local, tmp_path, capsys, files):
    Breaking.left = files
    assert run(local, "push", "colours", BREAKING_URL) == 2
    assert (
        capsys.readouterr().err
        == f"error: {BREAKING_URL}: ConnectionResetError: connection reset by peer\n"
    )
    Breaking.left = 1 << 30
    for version in ("latest", "2"):
        assert run(tmp_path / "other", "pull", "colours", version, BREAKING_URL) == 2
        assert "no such version, or it is incomplete" in capsys.readouterr().err
    assert run(local, "push", "colours", BREAKING_URL) == 0
    assert run(tmp_path / "other", "pull", "colours", BREAKING_URL) == 0


@pytest.mark.parametrize("files", [0, 1, 5, 18])
def test_an_interrupted_pull_is_invisible_and_can_be_repeated(local, tmp_path, capsys, files):
    assert run(local, "push", "colours", BREAKING_URL) == 0
    Breaking.left = files
    assert run(tmp_path / "other", "pull", "colours", BREAKING_URL) == 2
    assert "ConnectionResetError" in capsys.readouterr().err
    assert [p for p in (tmp_path / "other").rglob("*") if p.is_file()] == []
    Breaking.left = 1 << 30
    assert run(tmp_path / "other", "pull", "colours", BREAKING_URL) == 0


def test_damage_in_transfer_is_noticed(local, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Breaking, "loses", True)
    assert run(local, "push", "colours", BREAKING_URL) == 2
    assert "arrived damaged (sha256 differs)" in capsys.readouterr().err
    assert run(tmp_path / "other", "pull", "colours", "2", BREAKING_URL) == 2


def test_no_promote_leaves_latest_unchanged(local, tmp_path):
    assert run(local, "push", "colours", "1", URL) == 0
    assert run(local, "push", "colours", "2", URL, "--no-promote") == 0
    assert run(tmp_path / "other", "pull", "colours", URL) == 0
    assert Store(tmp_path / "other").latest("colours") == 1


def test_an_older_version_pushed_later_does_not_move_latest_back(local, tmp_path):
    assert run(local, "push", "colours", "2", URL) == 0
    assert run(local, "push", "colours", "1", URL) == 0
    assert run(tmp_path / "other", "pull", "colours", URL) == 0
    assert Store(tmp_path / "other").latest("colours") == 2
