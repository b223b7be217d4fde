"""The store: through the commands, and with many writers at once."""

import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from models.__main__ import main
from models.bundle import Bundle, BundleError, Latency, write_checksums
from models.store import Store
from support import tiny_bundle


def test_writers_at_the_same_time_get_different_versions(tmp_path):
    with ProcessPoolExecutor(4) as pool:
        paths = list(pool.map(tiny_bundle.publish, [tmp_path] * 12))
    assert sorted(int(path.name) for path in paths) == list(range(1, 13))
    store = Store(tmp_path)
    assert store.versions("colours") == list(range(1, 13))
    assert all(store.open("colours", v).manifest.version == v for v in range(1, 13))
    assert store.latest("colours") == 12
    assert not list((tmp_path / "colours").glob(".staging*"))


def test_a_writer_that_fails_leaves_nothing_visible(tmp_path):
    tiny_bundle.publish(tmp_path)
    store = Store(tmp_path)

    def power_cut():
        with store.stage("colours") as staged:
            (staged.path / "model.onnx").write_bytes(b"half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        power_cut()
    assert store.versions("colours") == [1]
    assert store.latest("colours") == 1


def test_an_incomplete_bundle_is_never_published(tmp_path):
    published = tiny_bundle.publish(tmp_path)
    store = Store(tmp_path)
    with store.stage("colours") as staged:
        shutil.copy(published / "manifest.json", staged.path)
        with pytest.raises(BundleError, match="SHA256SUMS: no such file"):
            staged.publish()
    assert store.versions("colours") == [1]


def test_a_late_writer_does_not_move_latest_back(tmp_path):
    store = Store(tmp_path)
    with store.stage("colours") as slow:
        fast = tiny_bundle.publish(tmp_path)
        assert (slow.version, fast.name) == (1, "2")
        assert store.latest("colours") == 2
        copy_as(fast, slow.path, 1)
        slow.publish()
    assert store.versions("colours") == [1, 2]
    assert store.latest("colours") == 2


def copy_as(source: Path, target: Path, version: int) -> None:
    """Copy a bundle to `target`, with another version in its manifest."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    manifest = Bundle(source, verify=False).manifest
    manifest.version = version
    manifest.write(target)
    write_checksums(target)


@pytest.fixture
def three(tmp_path) -> Path:
    for _ in range(3):
        tiny_bundle.publish(tmp_path)
    return tmp_path


@pytest.fixture(params=["a copy", "a file"])
def copied(three, tmp_path_factory, request) -> Path:
    """A copy of a store in which `latest`, version 3, is no link."""
    store = tmp_path_factory.mktemp("copied") / "store"
    shutil.copytree(three, store)  # follows links, as `cp -rL` does
    latest = store / "colours" / "latest"
    assert not latest.is_symlink()
    if request.param == "a file":
        shutil.rmtree(latest)
        latest.write_text("3\n")
    return store


def test_a_store_that_was_copied_without_links_is_read_and_written(copied, capsys):
    store = Store(copied)
    store.check_writable("colours")
    assert store.open("colours").manifest.version == 3
    assert run(copied, "promote", "colours", "1") == 0
    assert store.latest("colours") == 1
    assert (copied / "colours" / "latest").is_symlink()
    assert tiny_bundle.publish(copied).name == "4"
    assert store.latest("colours") == 4
    assert not list((copied / "colours").glob(".*latest*"))


def test_a_new_version_replaces_a_copied_latest(copied):
    assert tiny_bundle.publish(copied).name == "4"
    assert Store(copied).latest("colours") == 4


def test_latest_that_is_another_directory_is_refused_before_training(three, capsys):
    latest = three / "colours" / "latest"
    latest.unlink()
    latest.mkdir()
    (latest / "notes").touch()
    with pytest.raises(BundleError, match="not a copy of a version of colours; move it away"):
        Store(three).check_writable("colours")
    assert run(three, "promote", "colours", "1") == 2
    assert "latest: a directory that is not a copy" in capsys.readouterr().err
    assert (latest / "notes").exists()


def test_a_check_creates_nothing(tmp_path):
    Store(tmp_path / "store").check_writable("colours")
    assert not list(tmp_path.iterdir())


def run(store: Path, *arguments: str) -> int:
    return main([*arguments, "--store", str(store)])


def test_list_and_show(three, capsys):
    assert run(three, "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["colours", "1"],
        ["colours", "2"],
        ["colours", "3"],
    ]
    assert [line.endswith("latest") for line in lines[1:]] == [False, False, True]
    assert run(three, "show", "colours", "2") == 0
    assert "colours/2  tiny, 3 classes" in capsys.readouterr().out
    assert run(three, "show", "colours", "--json") == 0
    assert (
        Bundle(three / "colours" / "3").manifest.model_dump_json(indent=1)
        == capsys.readouterr().out.strip()
    )


def test_show_prints_the_speed_per_core(tmp_path, capsys):
    bundle = Bundle(tiny_bundle.publish(tmp_path), verify=False)
    fp32 = bundle.manifest.variants["fp32"]
    fp32.latency = Latency(
        device="a CPU, 4 cores", threads=4, batch_ms={8: 10.0}, images_per_second=800.0
    )
    bundle.manifest.write(bundle.path)
    assert run(tmp_path, "show", "colours") == 0
    assert "800 images/s (200 per core, 4 cores)" in capsys.readouterr().out


def test_list_also_lists_a_broken_bundle(three, capsys):
    (three / "colours" / "2" / "manifest.json").write_text("{")
    assert run(three, "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "unreadable" in lines[2]
    assert lines[3].endswith("latest")


def test_rollback_and_promote(three, capsys):
    assert run(three, "rollback", "colours") == 0
    assert Store(three).latest("colours") == 2
    assert run(three, "promote", "colours", "3") == 0
    assert Store(three).latest("colours") == 3
    assert run(three, "promote", "colours", "1") == 0
    assert run(three, "rollback", "colours") == 2
    assert "no version older than 1" in capsys.readouterr().err


def test_a_broken_version_is_not_promoted(three, capsys):
    (three / "colours" / "1" / "model.onnx").write_bytes(b"")
    assert run(three, "promote", "colours", "1") == 2
    assert "model.onnx: changed since it was written" in capsys.readouterr().err
    assert Store(three).latest("colours") == 3


def test_prune_keeps_latest_and_the_one_before_it(three):
    for _ in range(3):
        tiny_bundle.publish(three)
    Store(three).promote("colours", 2)
    assert run(three, "prune", "colours", "--keep", "2") == 0
    assert Store(three).versions("colours") == [1, 2, 5, 6]
    assert tiny_bundle.publish(three).name == "7"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "colors"], "no model 'colors' in this store; it has colours"),
        (["show", "colours", "9"], "colours has no version 9; it has 1, 2, 3"),
        (["promote", "colours", "latest"], "give a number"),
        (["promote", "colours", "../../x"], "give a number"),
        (["show", "colours", "../../x"], "has no version"),
        (["rollback", "../colours"], "no model '../colours'"),
        (["push", "colours", "nowhere://bucket/x"], "nowhere://bucket/x"),
        (["pull", "colours", "file:///no/such/store"], "no model 'colours' in this store"),
        (["pull", "colours", "first", "file:///no/such/store"], "give a number or latest"),
    ],
)
def test_errors_are_one_line(three, capsys, arguments, message):
    assert run(three, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_the_commands_do_not_import_torch(three):
    code = (
        "import sys; sys.modules['torch'] = None; "  # importing it raises ImportError
        "from models.__main__ import main; "
        "sys.exit(main(['verify', 'colours', '--store', sys.argv[1]]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(three)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr
