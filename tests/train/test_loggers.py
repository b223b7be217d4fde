"""Metrics and pictures reach every logger, also of a resumed run. Their files are read back."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.forked_commands import ForkedCommands

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
METRICS = {
    "train/loss",
    "train/accuracy",
    "val/loss",
    "val/accuracy",
    "train/loss_step",
    "train/accuracy_step",
}


def train(commands: ForkedCommands, directory: Path, logger: str) -> Path:
    """Train two epochs of 13 steps, stopped in the second and resumed; return the run directory."""
    settings = (
        "run",
        "digits",
        f"--logger={logger}",
        "--trainer.max_epochs=2",
        "--trainer.log_every_n_steps=5",
        "--data.batch_size=100",
        "--export.enabled=false",
        "--audit.enabled=false",
        "--progress.quiet=true",
        "--trainer.callbacks+=support.interruption_callbacks.SendSignal",
        f"--trainer.default_root_dir={directory / 'runs'}",
    )
    environment = {
        "HOME": str(directory),
        "WANDB_MODE": None,
        "WANDB_API_KEY": None,
        "MLFLOW_TRACKING_URI": None,
    }
    interruption = {"SEND_SIGNAL": "TERM:step:20"}
    interrupted = commands.start(*settings, env=environment | interruption, cwd=directory)
    assert interrupted.status() == 143
    commands.run(*settings, env=environment, cwd=directory)
    return directory / "runs/digits/1"


def test_csv(commands, tmp_path):
    run = train(commands, tmp_path, "csv")
    with open(run / "csv/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0].keys() >= METRICS
    assert [int(row["step"]) for row in rows if row["train/loss_step"]] == [4, 9, 14, 19, 24]
    assert [int(row["step"]) for row in rows if row["val/accuracy"]] == [12, 25]
    pictures = sorted((run / "csv/val/predictions").iterdir())
    assert [p.name for p in pictures] == ["0000013.png", "0000026.png"]
    assert pictures[0].read_bytes()[:4] == b"\x89PNG"


def test_tensorboard(commands, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(commands, tmp_path, "tensorboard")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= METRICS
    assert [event.step for event in events.Scalars("train/loss_step")] == [4, 9, 14, 19, 24]
    assert [event.step for event in events.Scalars("val/loss")] == [12, 25]
    assert [event.step for event in events.Images("val/predictions")] == [13, 26]
    assert events.Images("val/predictions")[0].encoded_image_string[:4] == b"\x89PNG"


def test_steps_before_the_first_checkpoint_are_not_logged_twice(commands, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = (
        "run",
        "digits",
        "--trainer.max_epochs=1",
        "--trainer.log_every_n_steps=1",
        "--data.batch_size=100",
        "--export.enabled=false",
        "--audit.enabled=false",
        "--trainer.callbacks+=support.interruption_callbacks.SendSignal",
    )
    finished = commands.start(*settings, env={"SEND_SIGNAL": "TERM:epoch:2"}, cwd=tmp_path)
    assert finished.status() == 0
    (run,) = (tmp_path / "artifacts/runs/digits").iterdir()
    # As if it had been killed before its first checkpoint, with its logs on disk.
    (run / "finished").unlink()
    (run / "last.ckpt").unlink()
    assert "no complete checkpoint" in commands.run(*settings, cwd=tmp_path).text
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss_step")] == list(range(13))


def leveldb_log(data: bytes) -> Iterator[bytes]:
    """Yield the records of a .wandb file: seven bytes, then LevelDB's log format.

    Blocks of 32 KiB hold pieces, each marked as a whole record (1), or the first (2), a middle (3)
    or the last piece (4) of one.
    """
    offset = 7
    block = 1 << 15
    record = b""
    while offset + 7 <= len(data):
        if block - offset % block < 7:
            offset += block - offset % block
            continue
        length = int.from_bytes(data[offset + 4 : offset + 6], "little")
        kind = data[offset + 6]
        record += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


@pytest.mark.slow
def test_wandb_offline(commands, tmp_path):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    from wandb.proto import wandb_internal_pb2 as messages

    run = train(commands, tmp_path, "wandb")
    logged: dict[str, list] = {}
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_log(file.read_bytes()):
            record = messages.Record()
            record.ParseFromString(data)
            for item in record.history.item:
                logged.setdefault(item.key or "/".join(item.nested_key), []).append(
                    json.loads(item.value_json)
                )
    assert logged.keys() >= METRICS
    assert len(logged["val/accuracy"]) == 2
    assert logged["val/predictions/count"] == [1, 1]
    pictures = list(run.glob("wandb/offline-run-*/files/media/images/val/predictions*.png"))
    assert len(pictures) == 2


@pytest.mark.slow
def test_mlflow_local_store(commands, tmp_path):
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    from mlflow.tracking import MlflowClient

    train(commands, tmp_path, "mlflow")
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert run.data.metrics.keys() >= METRICS
    history = client.get_metric_history(run.info.run_id, "val/loss")
    assert [metric.step for metric in history] == [12, 25]
    pictures = client.list_artifacts(run.info.run_id, "val/predictions")
    assert [Path(picture.path).name for picture in pictures] == ["0000013.png", "0000026.png"]


def test_several_at_once(commands, tmp_path):
    settings = (
        "run",
        "digits",
        "--trainer.max_epochs=1",
        "--export.enabled=false",
        "--audit.enabled=false",
        "--trainer.default_root_dir",
    )
    commands.run(*settings, tmp_path, "--logger=csv,tensorboard")
    assert {"csv", "tensorboard"} <= {p.name for p in (tmp_path / "digits/1").iterdir()}
