"""Pushing and pulling: through the commands, over fsspec's own file systems, with a copy that breaks off halfway."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from support import tiny_bundle
from support.server import s3_server

from models.__main__ import main
from models.bundle import Bundle
from models.store import Store

URL = "memory://bucket/store"


@pytest.fixture(autouse=True)
def empty_bucket():
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    Breaking.left = 1 << 30


def run(store: Path, *words: str) -> int:
    return main([*words, "--store", str(store)])


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A store with colours/1 and colours/2."""
    tiny_bundle.publish(tmp_path / "here")
    tiny_bundle.publish(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A place for a store in each kind of file system."""
    if request.param == "s3":
        with s3_server("bucket"):
            yield "s3://bucket/store"
    else:
        yield URL if request.param == "memory" else f"file://{tmp_path}/far"


def test_there_and_back(here, tmp_path, url, capsys):
    there = tmp_path / "there"
    assert run(here, "push", "colours", "1", url) == 0
    assert run(here, "push", "colours", url) == 0
    assert f"pushed to {url}/colours/2" in capsys.readouterr().out
    assert run(there, "pull", "colours", url) == 0
    assert Store(there).versions("colours") == [2]
    assert Store(there).latest("colours") == 2
    assert run(there, "pull", "colours", "1", url) == 0
    assert Store(there).latest("colours") == 2
    assert Bundle(there / "colours" / "1").digest == Bundle(here / "colours" / "1").digest


def test_a_second_time_nothing_is_copied(here, tmp_path, capsys):
    for said in ("pushed to", "already at"):
        assert run(here, "push", "colours", URL) == 0
        assert said in capsys.readouterr().out
    for said in ("pulled to", "already at"):
        assert run(tmp_path / "there", "pull", "colours", URL) == 0
        assert said in capsys.readouterr().out


def test_another_bundle_under_the_same_version_is_refused(here, tmp_path, capsys):
    assert run(here, "push", "colours", "1", URL) == 0
    other = tmp_path / "other"
    tiny_bundle.publish(other, scale=2)
    assert run(other, "push", "colours", URL) == 2
    assert f"{URL}/colours/1: exists already with other contents" in capsys.readouterr().err
    assert run(other, "pull", "colours", URL) == 2
    assert "has other contents than" in capsys.readouterr().err


def test_a_broken_bundle_is_not_pushed(here, capsys):
    (here / "colours" / "2" / "model.onnx").write_bytes(b"torn")
    assert run(here, "push", "colours", URL) == 2
    assert "model.onnx: changed since" in capsys.readouterr().err
    assert not MemoryFileSystem.store


def test_what_was_changed_there_is_not_pulled(here, tmp_path, capsys):
    assert run(here, "push", "colours", URL) == 0
    fsspec.filesystem("memory").pipe_file("/bucket/store/colours/2/samples/00.png", b"torn")
    assert run(tmp_path / "there", "pull", "colours", URL) == 2
    assert "samples/00.png: changed since" in capsys.readouterr().err
    assert Store(tmp_path / "there").versions("colours") == []


def test_names_that_climb_out_are_not_pulled(here, tmp_path, capsys):
    assert run(here, "push", "colours", URL) == 0
    sums = "/bucket/store/colours/2/SHA256SUMS"
    far = fsspec.filesystem("memory")
    far.pipe_file(sums, far.cat_file(sums) + f"{'0' * 64}  ../../../evil\n".encode())
    assert run(tmp_path / "there", "pull", "colours", URL) == 2
    assert "'../../../evil' points outside the bundle" in capsys.readouterr().err
    assert not (tmp_path / "evil").exists()


class Breaking(MemoryFileSystem):
    """A memory file system whose line goes dead after so many files, or that loses bytes on the way."""

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
FRAIL = "breaking://bucket/store"


@pytest.mark.parametrize("files", [0, 1, 5, 18])
def test_a_push_that_breaks_off_is_not_visible_and_can_be_repeated(here, tmp_path, capsys, files):
    Breaking.left = files
    assert run(here, "push", "colours", FRAIL) == 2
    assert (
        capsys.readouterr().err
        == f"error: {FRAIL}: ConnectionResetError: connection reset by peer\n"
    )
    Breaking.left = 1 << 30
    for version in ("latest", "2"):
        assert run(tmp_path / "there", "pull", "colours", version, FRAIL) == 2
        assert "no such version, or it is incomplete" in capsys.readouterr().err
    assert run(here, "push", "colours", FRAIL) == 0
    assert run(tmp_path / "there", "pull", "colours", FRAIL) == 0


@pytest.mark.parametrize("files", [0, 1, 5, 18])
def test_a_pull_that_breaks_off_is_not_visible_and_can_be_repeated(here, tmp_path, capsys, files):
    assert run(here, "push", "colours", FRAIL) == 0
    Breaking.left = files
    assert run(tmp_path / "there", "pull", "colours", FRAIL) == 2
    assert "ConnectionResetError" in capsys.readouterr().err
    assert [p for p in (tmp_path / "there").rglob("*") if p.is_file()] == []
    Breaking.left = 1 << 30
    assert run(tmp_path / "there", "pull", "colours", FRAIL) == 0


def test_what_arrives_damaged_is_noticed_on_the_way_there(here, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Breaking, "loses", True)
    assert run(here, "push", "colours", FRAIL) == 2
    assert "arrived damaged (sha256 differs)" in capsys.readouterr().err
    assert run(tmp_path / "there", "pull", "colours", "2", FRAIL) == 2


def test_no_promote_leaves_latest_where_it_is(here, tmp_path):
    assert run(here, "push", "colours", "1", URL) == 0
    assert run(here, "push", "colours", "2", URL, "--no-promote") == 0
    assert run(tmp_path / "there", "pull", "colours", URL) == 0
    assert Store(tmp_path / "there").latest("colours") == 1


def test_an_older_version_pushed_later_does_not_move_latest_back(here, tmp_path):
    assert run(here, "push", "colours", "2", URL) == 0
    assert run(here, "push", "colours", "1", URL) == 0
    assert run(tmp_path / "there", "pull", "colours", URL) == 0
    assert Store(tmp_path / "there").latest("colours") == 2
