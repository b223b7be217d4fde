"""Prometheus metrics of a training run."""

import os
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from support.server import find_free_ports

LISTEN_STATE = "0A"  # in /proc/net/tcp


def scrape(port: int) -> dict[str, float]:
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name] = sample.value
    return values


def start_sleeping_run(commands, directory, step: int, *flags, moment: str = "step"):
    """Start a run that sleeps in a step or at another moment; return it and its metrics port."""
    (port,) = find_free_ports(1)
    command = commands.start(
        "run",
        "digits",
        f"--monitor.port={port}",
        "--monitor.host=127.0.0.1",
        "--logger=none",
        "--audit.enabled=false",
        "--progress.quiet=true",
        *flags,
        "--trainer.callbacks+=support.interruption_callbacks.SendSignal",
        env={"SEND_SIGNAL": f"SLEEP:{moment}:{step}"},
        cwd=directory,
    )
    command.wait_for("asleep")
    return command, port


def test_metrics_follow_the_training(commands, tmp_path):
    command, port = start_sleeping_run(
        commands, tmp_path, 20, "--trainer.log_every_n_steps=1", "--data.batch_size=100"
    )
    # Step 20 is the seventh of the second epoch: 1,295 images make 13 steps.
    metrics = scrape(port)
    assert metrics["imago_train_epoch"] == 2
    assert metrics["imago_train_epochs"] == 40
    assert metrics["imago_train_step"] == 20
    assert metrics["imago_train_images_total"] in (1295 + 600, 1295 + 700)
    assert metrics["imago_train_images_per_second"] > 0
    assert 0 < metrics["imago_train_loss"] < 3
    assert 0 < metrics["imago_train_accuracy"] <= 1
    assert 0 < metrics["imago_train_val_loss"] < 3
    assert 0 < metrics["imago_train_val_accuracy"] <= 1
    assert 0 < metrics["imago_train_learning_rate"] < 1
    assert metrics["imago_train_fitting"] == 1
    assert metrics["process_resident_memory_bytes"] > 1e8
    other = commands.start(
        "run", "digits", f"--monitor.port={port}", "--monitor.host=127.0.0.1", cwd=tmp_path
    )
    assert other.status() == 2
    assert (
        other.text
        == f"train: monitor.port: can't listen on 127.0.0.1:{port}: Address already in use\n"
    )
    command.send_signal(9)


def test_fitting_is_0_while_the_bundle_is_written(commands, tmp_path):
    command, port = start_sleeping_run(
        commands, tmp_path, 0, "--trainer.max_epochs=1", moment="after"
    )
    metrics = scrape(port)
    assert metrics["imago_train_images_total"] > 1000
    assert metrics["imago_train_fitting"] == 0
    command.send_signal(9)


def test_without_step_logs_metrics_follow_the_epochs(commands, tmp_path):
    command, port = start_sleeping_run(
        commands, tmp_path, 4, "--trainer.log_every_n_steps=0", "--data.batch_size=500"
    )
    # in the first step of the second epoch
    assert scrape(port)["imago_train_loss"] > 0
    command.send_signal(9)


def test_without_a_port_nothing_listens(commands, tmp_path):
    command = commands.start(
        "run",
        "digits",
        "--logger=none",
        "--audit.enabled=false",
        "--trainer.callbacks+=support.interruption_callbacks.SendSignal",
        env={"SEND_SIGNAL": "SLEEP:step:3"},
        cwd=tmp_path,
    )
    command.wait_for("asleep")
    process = Path(f"/proc/{command.pid}")
    listening: set[str] = set()  # sockets of any process
    for table in ("tcp", "tcp6"):
        for line in (process / "net" / table).read_text().splitlines():
            columns = line.split()
            if columns[3] == LISTEN_STATE:
                listening.add(f"socket:[{columns[9]}]")
    open_files = {os.readlink(file) for file in (process / "fd").iterdir()}
    assert not listening & open_files
    command.send_signal(9)
