"""The gate of training: a new version that is worse than the latest is published, not promoted."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from models.__main__ import main
from models.bundle import Bundle
from support import ROOT
from support.server import find_free_ports

QUICK = (
    *("--data.source", "digits", "--model.network", "convnet", "--trainer.max_epochs", 2),
    *("--export.quantize.enabled", "false", "--progress.quiet", "true", "--logger", "none"),
    *("--audit.enabled", "false"),
)


@pytest.fixture(scope="module")
def refused(commands, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A good version, then one that has learned nothing: the store, and the second command."""
    directory = tmp_path_factory.mktemp("gate")
    flags = (*QUICK, "--store", directory / "store", "--trainer.default_root_dir", directory / "r")
    commands.run("fit", *flags, cwd=ROOT)
    (port,) = find_free_ports(1)
    command = commands.start(
        *("fit", *flags, "--model.optimizer.lr", 1e-9),
        *("--monitor.port", port, "--monitor.host", "127.0.0.1"),
        cwd=ROOT,
    )
    command.wait_for("is not promoted")
    metrics = ""
    while "imago_train_gate_refused 1.0" not in metrics:  # it is set just after the line
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    command.wait()
    return SimpleNamespace(store=directory / "store", command=command, metrics=metrics)


def open_version(refused: SimpleNamespace, version: str) -> Bundle:
    return Bundle(refused.store / "digits" / version)


def test_the_first_version_passes_and_lists_its_test_images(refused):
    bundle = open_version(refused, "1")
    assert bundle.manifest.gate is None
    lines = (bundle.path / "test_images.csv").read_text().splitlines()
    assert lines[0] == "path,label,sha256,part,weight"
    test = bundle.manifest.test_metrics
    assert test is not None
    assert len(lines) == 1 + test.images
    assert not (bundle.path / "comparison.html").exists()


def test_a_worse_version_is_published_but_not_promoted(refused):
    assert refused.command.returncode == 3
    assert (refused.store / "digits" / "latest").resolve().name == "1"
    bundle = open_version(refused, "2")
    gate = bundle.manifest.gate
    assert gate is not None
    assert not gate.passed
    assert gate.compared_with == 1
    first = open_version(refused, "1").manifest.test_metrics
    second = bundle.manifest.test_metrics
    assert gate.difference == pytest.approx(second.accuracy - first.accuracy)
    assert any(
        note.startswith("gate refused: test accuracy falls") for note in bundle.manifest.notes
    )

    last_line = refused.command.text.strip().splitlines()[-1]
    assert last_line.startswith("train: digits/2 is not promoted, version 1 stays the latest: ")
    assert "models promote digits 2 --force" in last_line
    assert "serve it" not in refused.command.text


def test_the_comparison_is_in_the_bundle_and_the_report(refused):
    bundle = open_version(refused, "2")
    results = json.loads((bundle.path / "comparison.json").read_text())
    assert results["old"]["title"] == "digits/1"
    assert results["gate"]["passed"] is False
    page = (bundle.path / "comparison.html").read_text()
    assert "Refused by the gate" in page
    assert page.count("<img") == min(60, results["parts"]["test"]["pairs"]["lost"])
    assert "gate refused" in (bundle.path / "report.html").read_text()
    # What it costs is part of the provenance, as of every step.
    assert bundle.manifest.provenance.seconds["gate"] > 0


def test_the_refusal_is_a_metric_that_is_scraped_before_the_end(refused):
    assert re.search(r"^imago_train_gate_refused 1\.0$", refused.metrics, re.MULTILINE)


def test_compare_gives_the_same_results_later(refused, tmp_path):
    file = tmp_path / "again.json"
    store = ("--store", str(refused.store))
    status = main(["compare", "digits/1", "digits/2", *store, "--json", str(file)])
    assert status == 1
    again = json.loads(file.read_text())
    before = json.loads((open_version(refused, "2").path / "comparison.json").read_text())
    assert again["parts"] == before["parts"]


def test_a_refused_version_is_promoted_by_force(refused, capsys):
    store = ("--store", str(refused.store))
    assert main(["promote", "digits", "2", *store]) == 2
    assert "promote it anyway with --force" in capsys.readouterr().err
    assert main(["promote", "digits", "2", "--force", *store]) == 0
    assert main(["promote", "digits", "1", *store]) == 0


def test_the_budgets_are_settings(refused, commands: Callable):
    """A budget that allows the loss passes: the third version is like the second."""
    flags = (*QUICK, "--store", refused.store, "--model.optimizer.lr", 1e-9)
    runs = ("--trainer.default_root_dir", refused.store.parent / "runs")
    budgets = ("accuracy", "class_recall", "calibration")
    allowed = [f"--export.gate.{name}=1" for name in budgets]
    commands.run("fit", *flags, *runs, *allowed, cwd=ROOT)
    assert (refused.store / "digits" / "latest").resolve().name == "3"
    gate = open_version(refused, "3").manifest.gate
    assert gate is not None
    assert gate.passed
    assert main(["promote", "digits", "1", "--store", str(refused.store)]) == 0


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--export.gate.accuracy=2", "gate.accuracy: 2.0 is not in 0..1"),
        ("--export.gate.latency=0.5", "gate.latency: 0.5 is less than 1"),
    ],
)
def test_invalid_budgets_are_refused(commands, tmp_path: Path, flag: str, message: str):
    command = commands.start("run", "digits", flag, cwd=tmp_path)
    assert command.wait() == 2
    assert message in command.text
