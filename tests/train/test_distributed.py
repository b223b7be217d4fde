"""Several processes give the results of one, on the CPU, with torchrun and with Lightning."""

import collections
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from models import networks
from support import ROOT
from support.s3_server import S3Server, failing_s3_server
from support.sample_images import write_image_folder
from support.server import find_free_ports

# No augmentation, so that images are distinguishable, and no batch norm, whose statistics each
# process computes by itself. Plain SGD, as its steps depend on the size of the gradients.
SETTINGS = (
    "run",
    "digits",
    "--trainer.max_epochs=2",
    "--trainer.log_every_n_steps=1",
    "--logger=csv",
    "--audit.enabled=false",
    "--model.network=convnet",
    "--model.optimizer.name=sgd",
    "--model.optimizer.lr=0.05",
    "--trainer.callbacks+=support.interruption_callbacks.SendSignal",
    "--trainer.callbacks+=support.interruption_callbacks.RecordBatches",
)


def torchrun(
    directory: Path,
    *settings: str,
    flags: tuple[str, ...] = ("--nproc-per-node", "2"),
    kill: str = "",
    wait: bool = True,
    first: tuple[str, ...] = SETTINGS,
) -> subprocess.Popen:
    return launch(
        directory,
        *settings,
        kill=kill,
        wait=wait,
        first=first,
        through=(
            "-m",
            "torch.distributed.run",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint",
            f"127.0.0.1:{find_free_ports(1)[0]}",
            *flags,
        ),
    )


def launch(
    directory: Path,
    *settings: str,
    through: tuple[str, ...] = (),
    kill: str = "",
    wait: bool = True,
    first: tuple[str, ...] = SETTINGS,
) -> subprocess.Popen:
    (directory / "seen").mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "SEND_SIGNAL": kill,
        "RECORD": str(directory / "seen"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    with open(directory / "log", "ab") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                *through,
                "-m",
                "train",
                *first,
                f"--trainer.default_root_dir={directory / 'runs'}",
                f"--store={directory / 'store'}",
                *settings,
            ],
            cwd=directory,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if wait:
        process.wait(280)
    return process


def read_history(directory: Path) -> list[dict[str, float]]:
    """Return loss and accuracy of training and validation, by epoch."""
    with open(directory / "runs/digits/1/csv/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    by_epoch: list[dict[str, float]] = []
    for name in ("train/loss", "train/accuracy", "val/loss", "val/accuracy"):
        values = [float(row[name]) for row in rows if row[name]]
        if not by_epoch:
            by_epoch = [{} for _ in values]
        for epoch, value in zip(by_epoch, values, strict=True):
            epoch[name] = value
    return by_epoch


def count_trained_images(directory: Path) -> dict[str, collections.Counter]:
    """How often each image was trained on, by epoch, over all processes."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for file in (directory / "seen").iterdir():
        for line in file.read_text().splitlines():
            epoch, image = line.split()
            counts[epoch][image] += 1
    return counts


@pytest.fixture(scope="module")
def one(commands, tmp_path_factory) -> Path:
    """A run of one process with the batches of both."""
    directory = tmp_path_factory.mktemp("one")
    (directory / "seen").mkdir()
    commands.run(
        *SETTINGS,
        "--data.batch_size=64",
        "--export.enabled=false",
        f"--trainer.default_root_dir={directory / 'runs'}",
        env={"RECORD": str(directory / "seen")},
        cwd=directory,
    )
    return directory


def assert_alike(two: Path, one: Path) -> None:
    for row, expected in zip(read_history(two), read_history(one), strict=True):
        for name, value in expected.items():
            # The prediction for one of the 143 validation images may differ.
            tolerance = 0.008 if "accuracy" in name else 1e-3
            assert row[name] == pytest.approx(value, abs=tolerance), name

    trained_images = count_trained_images(two)
    assert trained_images == count_trained_images(one)
    assert sum(trained_images["0"].values()) == 1295
    assert [p.name for p in (two / "store/digits").iterdir() if p.name[0].isdigit()] == ["1"]


@pytest.mark.slow
def test_two_processes_stopped_and_resumed_give_the_results_of_one(one, tmp_path):
    stopped = torchrun(tmp_path, "--data.batch_size=32", kill="LAUNCHER:step:27")
    log = (tmp_path / "log").read_text()
    assert stopped.returncode != 0, log
    (checkpoint,) = (tmp_path / "runs/digits/1").glob("step-*.ckpt")
    assert 27 <= int(checkpoint.stem.removeprefix("step-")) < 42, log
    finished = torchrun(tmp_path, "--data.batch_size=32")
    log = (tmp_path / "log").read_text()
    assert finished.returncode == 0, log
    assert log.count("resuming from step") == 1
    assert_alike(tmp_path, one)


@pytest.mark.slow
def test_lightning_starts_the_processes_itself(one, tmp_path):
    done = launch(tmp_path, "--data.batch_size=32", "--trainer.devices=2", "--trainer.strategy=ddp")
    assert done.returncode == 0, (tmp_path / "log").read_text()
    assert_alike(tmp_path, one)


def run_two_nodes(
    directory: Path, *settings: str, roots: tuple[str, ...] = (), kill: str = ""
) -> list[int]:
    """Run a launcher for each of two nodes until both end; return their exit statuses.

    `roots` are the directories of the runs of each; without it both have the same.
    """
    flags = (
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-id=imago",
        "--rdzv-endpoint",
        f"127.0.0.1:{find_free_ports(1)[0]}",
    )
    nodes: list[subprocess.Popen] = []
    try:
        for number in range(2):
            own = [f"--trainer.default_root_dir={directory / root}" for root in roots[number:][:1]]
            node = torchrun(directory, *settings, *own, flags=flags, kill=kill, wait=False)
            nodes.append(node)
        return [node.wait(280) for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                node.kill()


@pytest.mark.slow
def test_two_launchers_meet(one, tmp_path):
    statuses = run_two_nodes(tmp_path, "--data.batch_size=32")
    assert statuses == [0, 0], (tmp_path / "log").read_text()
    assert_alike(tmp_path, one)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with failing_s3_server("bucket") as server:
        yield server


@pytest.mark.slow
def test_two_nodes_without_a_shared_volume_resume_from_a_bucket(one, s3, tmp_path):
    """The first process uploads. Each node, here a directory, fetches the checkpoint."""
    settings = ("--data.batch_size=32", "--resume.url=s3://bucket/runs")
    statuses = run_two_nodes(tmp_path, *settings, roots=("a", "b"), kill="TERM:step:27")
    log = (tmp_path / "log").read_text()
    assert 0 not in statuses, log
    newest = json.loads(s3.read("bucket", "runs/digits/1/newest"))
    assert 27 <= newest["step"] < 42, log
    uploaded = s3.keys("bucket", f"runs/digits/1/{newest['snapshot']}/")
    assert [Path(key).name for key in uploaded].count(newest["checkpoint"]) == 1

    statuses = run_two_nodes(tmp_path, *settings, roots=("c", "d"))
    log = (tmp_path / "log").read_text()
    assert statuses == [0, 0], log
    assert log.count(f"resuming from step {newest['step']}") == 1, log
    assert "runs/digits/1/finished" in s3.keys("bucket", "runs/")

    (finished,) = tmp_path.glob("[cd]/digits/1/finished")  # of the first process
    finished.parents[2].rename(tmp_path / "runs")
    (other,) = tmp_path.glob("[cd]/digits/1")
    assert (other / newest["checkpoint"]).is_file()
    assert_alike(tmp_path, one)


@pytest.mark.slow
def test_two_processes_train_on_from_the_checkpoint_of_one(one, tmp_path):
    done = torchrun(
        tmp_path,
        "--data.batch_size=32",
        "--trainer.max_epochs=3",
        f"--ckpt_path={one / 'runs/digits/1/last.ckpt'}",
    )
    log = (tmp_path / "log").read_text()
    assert done.returncode == 0, log
    assert set(count_trained_images(tmp_path)) == {"2"}
    assert read_history(tmp_path)[0]["val/accuracy"] > 0.8


@pytest.mark.slow
def test_all_processes_end_when_one_fails(tmp_path):
    """Only the first one checks the store."""
    (tmp_path / "store").write_text("")
    done = torchrun(tmp_path, "--data.batch_size=32", "--trainer.max_epochs=1")
    assert done.returncode != 0
    assert "can't be created" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_predictions_of_all_processes_are_one_table(commands, tmp_path):
    torch.save(networks.build("convnet", 10, 1, 8).state_dict(), tmp_path / "weights.pt")
    first = (
        "predict",
        "--data.source=digits",
        "--model.network=convnet",
        "--model.weights=weights.pt",
        "--progress.quiet=true",
    )
    one = commands.run(*first, cwd=tmp_path).text
    done = torchrun(tmp_path, first=first)
    two = (tmp_path / "log").read_text()
    assert done.returncode == 0, two
    assert table(two) == table(one)
    assert len(table(one)) == 1 + 359


def table(log: str) -> list[str]:
    return [
        line for line in log.splitlines() if line == "image,label,confidence" or ".png," in line
    ]


@pytest.mark.slow
def test_a_process_whose_test_images_are_all_leaked_stays_in_step(tmp_path):
    for part in ("train", "test"):
        write_image_folder(tmp_path / "photos" / part, 8, first=100 * (part == "test"))
    test = sorted((tmp_path / "photos/test").rglob("*.png"))
    for file in test[::2]:  # all that the first process gets
        file.write_bytes((tmp_path / "photos/train" / file.parent.name / file.name).read_bytes())
    torch.save(networks.build("convnet", 3, 3, 32).state_dict(), tmp_path / "weights.pt")
    done = torchrun(
        tmp_path,
        "--model.weights=weights.pt",
        "--data.batch_size=2",
        first=("test", "--data.source=photos", "--model.network=convnet", "--audit.enabled=true"),
    )
    log = (tmp_path / "log").read_text()
    assert done.returncode == 0, log
    assert "WARNING: 12 test images" in log
    assert "test_unleaked/accuracy" in log
