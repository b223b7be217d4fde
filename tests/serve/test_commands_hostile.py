"""The commands where all is not as it should be: closed directories, pipes, names that are no text, and Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
from support import ROOT, tiny_bundle
from support.blocked_path import BlockedPath
from support.server import assert_refused, wait_until

COMMAND = [sys.executable, "-m", "serve"]
ORDINARY = (
    ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
)  # obeys file modes
RED = tiny_bundle.make_image("red")


def begin(
    *arguments: str | Path,
    as_user: bool = False,
    env: dict[str, str] | None = None,
    stdin=None,
    stdout=PIPE,
) -> subprocess.Popen:
    """`python -m serve …`, which Ctrl-C ends as in a terminal, also where a shell has turned that off for the tests."""
    return subprocess.Popen(
        [*(ORDINARY if as_user else []), *COMMAND, *map(str, arguments)],
        cwd=ROOT,
        stdin=stdin,
        stdout=stdout,
        stderr=PIPE,
        text=True,
        env={**os.environ, **(env or {})},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(*arguments: str | Path, input: str | None = None, **options) -> subprocess.CompletedProcess:
    """The same, until it ends."""
    process = begin(*arguments, **options)
    out, error = process.communicate(input, timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def interrupted(process: subprocess.Popen) -> str:
    """What it wrote before it was ended by Ctrl-C, quietly."""
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=20)
    assert process.returncode == 130, error
    assert error == ""
    return out


@pytest.fixture
def images(tmp_path) -> Path:
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for place in ("a.png", "deep/b.png"):
        (tmp_path / "images" / place).write_bytes(RED)
    return tmp_path / "images"


@pytest.fixture
def closed():
    """Takes a directory's mode away, until the test has ended."""
    paths = []

    def close(path: Path, mode: int) -> None:
        paths.append(path)
        path.chmod(mode)

    if ORDINARY and not shutil.which(ORDINARY[0]):
        pytest.skip("there is no setpriv on this machine, and root may enter everything")
    yield close
    for path in paths:
        path.chmod(0o755)


@pytest.mark.parametrize("mode", [0o000, 0o400], ids=["not to be read", "not to be entered"])
def test_a_closed_directory_is_an_error_in_its_place(bundle_store, images, closed, mode):
    closed(images / "deep", mode)
    result = run("predict", images, "--store", bundle_store, "--format", "json", as_user=True)
    assert (result.returncode, result.stderr) == (1, "")
    good, bad = json.loads(result.stdout)["predictions"]
    assert good["label"] == "red"
    assert "Permission denied" in bad["error"]
    assert bad["file"].startswith(str(images / "deep"))


def test_a_file_below_a_closed_directory(bundle_store, images, closed):
    closed(images / "deep", 0)
    result = run("predict", images / "deep" / "b.png", "--store", bundle_store, as_user=True)
    assert_refused(result, "b.png: Permission denied")


@pytest.mark.parametrize(
    "command", [("predict", "a.png"), ("check",), ()], ids=["predict", "check", "serve"]
)
def test_a_closed_store(tmp_path, closed, command):
    tiny_bundle.publish(tmp_path / "store")
    closed(tmp_path / "store", 0)
    result = run(*command, "--store", tmp_path / "store", as_user=True)
    assert result.returncode in (1, 2)
    assert result.stderr == f"error: {tmp_path / 'store'}: can't be listed: Permission denied\n"


def test_what_is_no_model_may_be_closed(tmp_path, closed):
    """A file system's own directory for what was lost, say, in a volume that holds the store."""
    tiny_bundle.publish(tmp_path / "store")
    (tmp_path / "store" / "lost+found").mkdir()
    closed(tmp_path / "store" / "lost+found", 0)
    assert (
        json.loads(run("check", "--store", tmp_path / "store", "--json", as_user=True).stdout)[
            "model"
        ]
        == "colours"
    )


def test_an_image_from_a_pipe(bundle_store, images):
    with subprocess.Popen(["cat", images / "a.png"], stdout=PIPE) as cat:
        result = run(
            "predict", "/dev/stdin", "--store", bundle_store, "--format", "json", stdin=cat.stdout
        )
    assert result.returncode == 0, result.stderr
    assert [p["label"] for p in json.loads(result.stdout)["predictions"]] == ["red"]


@pytest.mark.parametrize("form", ["json", "csv", "table"])
def test_a_name_that_is_no_text(bundle_store, images, form):
    Path(os.fsdecode(bytes(images / "b") + b"\xff.png")).write_bytes(RED)
    result = run(
        "predict",
        images,
        "--store",
        bundle_store,
        "--format",
        form,
        env={"PYTHONIOENCODING": "utf-8:strict"},
    )
    assert result.returncode == 0, result.stderr
    for name in ("a.png", r"b\udcff.png", "deep/b.png"):
        assert f"{images}/{name}" in result.stdout
    assert form != "json" or len(json.loads(result.stdout)["predictions"]) == 3


@pytest.mark.parametrize("form", ["json", "csv", "table"])
def test_a_reader_that_has_seen_enough(bundle_store, images, form):
    ours, theirs = os.pipe()
    os.close(ours)
    result = run("predict", images, "--store", bundle_store, "--format", form, stdout=theirs)
    os.close(theirs)
    assert result.returncode in (1, 141)
    assert result.stderr == ""


def test_predict_is_interrupted_while_it_waits_for_a_pipe(bundle_store, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    process = begin("predict", tmp_path / "pipe", "--store", bundle_store)
    with (tmp_path / "pipe").open("wb"):  # once it reads
        assert interrupted(process) == ""


def test_check_is_interrupted(tmp_path):
    hang = BlockedPath(tmp_path / "hang", tiny_bundle.publish(tmp_path / "store"))
    with hang.blocked():
        process = begin("check", "--store", tmp_path / "store", env=hang.env)
        wait_until(hang.is_reached)
        assert "model            colours" in interrupted(process)


def test_bench_is_interrupted_and_shows_what_it_has(server):
    process = begin("bench", server.url, "--clients", "1,2", "--seconds", "1", "--json")
    assert process.stderr.readline() == "1 clients for 1 s\n"
    assert process.stderr.readline() == "2 clients for 1 s\n"
    (step,) = json.loads(interrupted(process))
    assert step["clients"] == 1
    assert set(step["statuses"]) == {"200"}


def test_bench_takes_the_key_from_where_the_service_does(start, tmp_path):
    service = start("--api-key", "secret")
    (tmp_path / "key").write_text("secret\n")
    bench = ("bench", service.url, "--clients", "1", "--seconds", "0.2", "--json")
    for flags, env in (
        (("--api-key", "secret"), {}),
        (("--api-key-file", tmp_path / "key"), {}),
        ((), {"IMAGO_API_KEY": "secret"}),
        ((), {"IMAGO_API_KEY_FILE": str(tmp_path / "key")}),
    ):
        result = run(*bench, *flags, env=env)
        assert result.returncode == 0, result.stderr
    assert run(*bench).returncode == 1
    for name in ("IMAGO_API_KEY]", "IMAGO_API_KEY_FILE]"):
        assert name in run("bench", "--help").stdout


def test_bench_sends_no_error_as_an_image(start, tmp_path):
    path = tiny_bundle.publish(tmp_path / "store")
    service = start(store=tmp_path / "store")
    (path / "samples" / "03.png").unlink()
    assert_refused(run("bench", service.url), "/samples/3", "404", "--image")
