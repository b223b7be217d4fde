"""The commands under adverse conditions: file modes, pipes, names that are not text, and SIGINT."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import IO, Any

import pytest

from support import ROOT, tiny_bundle
from support.blocked_path import BlockedPath
from support.forked_commands import ForkedCommand
from support.server import assert_refused, wait_until

COMMAND = [sys.executable, "-m", "serve"]
# Runs a command without root's right to ignore file modes.
AS_USER = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
RED_IMAGE = tiny_bundle.make_image("red")


def start_command(
    *arguments: str | Path,
    as_user: bool = False,
    env: dict[str, str] | None = None,
    stdin: IO[bytes] | None = None,
    stdout: int = PIPE,
) -> subprocess.Popen:
    """Start `python -m serve …`.

    SIGINT has its default effect, as in a terminal, even if the shell of the tests ignores it.
    """
    prefix = AS_USER if as_user else []
    return subprocess.Popen(
        [*prefix, *COMMAND, *map(str, arguments)],
        cwd=ROOT,
        stdin=stdin,
        stdout=stdout,
        stderr=PIPE,
        text=True,
        env={**os.environ, **(env or {})},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess:
    """Run `python -m serve …` until it ends."""
    process = start_command(*arguments, **options)
    output, error = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, output, error)


def interrupt(command: ForkedCommand) -> None:
    """Send SIGINT, and check that the command ends without a message."""
    command.send_signal(signal.SIGINT)
    assert command.status() == 130, command.text
    assert command.text == ""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A directory with an image, and another in the subdirectory `deep`."""
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    (images / "a.png").write_bytes(RED_IMAGE)
    (images / "deep" / "b.png").write_bytes(RED_IMAGE)
    return images


@pytest.fixture
def set_mode() -> Iterator[Callable[[Path, int], None]]:
    """Set the mode of a directory until the test ends."""
    if AS_USER and not shutil.which(AS_USER[0]):
        pytest.skip("without setpriv, root may read everything")
    paths: list[Path] = []

    def change(path: Path, mode: int) -> None:
        paths.append(path)
        path.chmod(mode)

    yield change
    for path in paths:
        path.chmod(0o755)


@pytest.mark.parametrize("mode", [0o000, 0o400], ids=["not readable", "not searchable"])
def test_a_closed_directory_is_an_error_in_the_results(bundle_store, images, set_mode, mode):
    set_mode(images / "deep", mode)
    result = run("predict", images, "--store", bundle_store, "--format", "json", as_user=True)
    assert result.returncode == 1
    assert result.stderr == ""
    classified, failed = json.loads(result.stdout)["predictions"]
    assert classified["label"] == "red"
    assert "Permission denied" in failed["error"]
    assert failed["file"].startswith(str(images / "deep"))


def test_a_file_in_a_closed_directory_is_refused(bundle_store, images, set_mode):
    set_mode(images / "deep", 0)
    result = run("predict", images / "deep" / "b.png", "--store", bundle_store, as_user=True)
    assert_refused(result, "b.png: Permission denied")


@pytest.mark.parametrize(
    "command", [("predict", __file__), ("check",), ()], ids=["predict", "check", "serve"]
)
def test_a_closed_store_is_refused(tmp_path, set_mode, command):
    store = tmp_path / "store"
    tiny_bundle.publish(store)
    set_mode(store, 0)
    result = run(*command, "--store", store, as_user=True)
    assert result.returncode in (1, 2)
    assert result.stderr == f"error: {store}: can't be listed: Permission denied\n"


def test_a_closed_directory_in_the_store_is_ignored(tmp_path, set_mode):
    """The root of a volume has a directory lost+found that only root may enter."""
    store = tmp_path / "store"
    tiny_bundle.publish(store)
    (store / "lost+found").mkdir()
    set_mode(store / "lost+found", 0)
    result = run("check", "--store", store, "--json", as_user=True)
    assert json.loads(result.stdout)["model"] == "colours"


def test_an_image_can_come_from_a_pipe(bundle_store, images):
    with subprocess.Popen(["cat", images / "a.png"], stdout=PIPE) as cat:
        result = run(
            "predict", "/dev/stdin", "--store", bundle_store, "--format", "json", stdin=cat.stdout
        )
    assert result.returncode == 0, result.stderr
    (prediction,) = json.loads(result.stdout)["predictions"]
    assert prediction["label"] == "red"


@pytest.mark.parametrize("output_format", ["json", "csv", "table"])
def test_a_file_name_that_is_not_text_is_escaped(bundle_store, images, output_format):
    Path(os.fsdecode(bytes(images / "b") + b"\xff.png")).write_bytes(RED_IMAGE)
    arguments = ("predict", images, "--store", bundle_store, "--format", output_format)
    result = run(*arguments, env={"PYTHONIOENCODING": "utf-8:strict"})
    assert result.returncode == 0, result.stderr
    for name in ("a.png", r"b\udcff.png", "deep/b.png"):
        assert f"{images}/{name}" in result.stdout
    if output_format == "json":
        assert len(json.loads(result.stdout)["predictions"]) == 3


@pytest.mark.parametrize("output_format", ["json", "csv", "table"])
def test_a_closed_pipe_ends_the_command_without_a_message(bundle_store, images, output_format):
    read_end, write_end = os.pipe()
    os.close(read_end)
    arguments = ("predict", images, "--store", bundle_store, "--format", output_format)
    result = run(*arguments, stdout=write_end)
    os.close(write_end)
    assert result.returncode in (1, 141)
    assert result.stderr == ""


def test_sigint_ends_predict_while_it_reads_from_a_pipe(serve_commands, bundle_store, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    command = serve_commands.start("predict", tmp_path / "pipe", "--store", bundle_store)
    # Opening the pipe waits until the command reads from it.
    with (tmp_path / "pipe").open("wb"):
        interrupt(command)


@pytest.mark.parametrize("output_format", ["json", "parquet"])
def test_an_interrupted_predict_leaves_the_output_file_as_it_was(
    serve_commands, bundle_store, images, tmp_path, output_format
):
    out = tmp_path / f"results.{output_format}"
    out.write_text("old")
    os.mkfifo(tmp_path / "pipe")
    arguments = ("predict", images, tmp_path / "pipe", "--store", bundle_store, "--out", out)
    command = serve_commands.start(*arguments)
    with (tmp_path / "pipe").open("wb"):
        interrupt(command)
    assert out.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"images", "pipe", out.name}


@pytest.mark.parametrize("output_format", ["json", "csv", "parquet"])
def test_a_full_disk_is_one_line_and_leaves_no_part(bundle_store, images, tmp_path, output_format):
    """The limit on the size of files stands for the disk."""
    out = tmp_path / f"results.{output_format}"
    script = "ulimit -f 0; trap '' XFSZ; exec \"$@\""
    arguments = ("predict", images, "--store", bundle_store, "--out", out)
    result = subprocess.run(
        ["bash", "-c", script, "bash", *COMMAND, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert_refused(result, f"--out {out}: File too large")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_sigint_ends_check_and_leaves_its_lines(tmp_path):
    blocked_path = BlockedPath(tmp_path / "hang", tiny_bundle.publish(tmp_path / "store"))
    with blocked_path.blocked():
        process = start_command("check", "--store", tmp_path / "store", env=blocked_path.env)
        wait_until(blocked_path.is_reached)
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert error == ""
    assert "model            colours" in output
