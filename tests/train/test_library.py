"""`from train import fit`: a run in a Python program, which it leaves as it was.

tests/examples runs it in a notebook.
"""

import logging
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.bundle import Bundle
from support import ROOT, sample_images
from train import fit
from train.cli import main
from train.learning.system import Classifier

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:::lightning"),  # advice on workers, intervals and the like
]
QUICK = {
    "trainer.max_epochs": 1,
    "samples.images": 0,
    "progress.quiet": True,
    "logger": "none",
    "audit.enabled": False,
    "export.quantize.enabled": False,
    "export.report": False,
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fit_digits(tmp_path: Path) -> Callable[..., Bundle]:
    """`fit_digits(settings)`: a short run on the digits, below `tmp_path`."""

    def run(settings: dict[str, object] | None = None) -> Bundle:
        runs = {"trainer.default_root_dir": tmp_path / "runs"}
        return fit("digits", {**QUICK, **runs, **(settings or {})}, store=tmp_path / "store")

    return run


def read_process_state() -> tuple[object, ...]:
    """Return what a run changes in its process."""
    return (
        signal.getsignal(signal.SIGINT),
        signal.getsignal(signal.SIGTERM),
        list(warnings.filters),
        logging.getLogger("lightning.pytorch").level,
        torch.get_num_threads(),
    )


def test_fit_returns_the_bundle_and_restores_the_process(fit_digits, tmp_path, capsys):
    before = read_process_state()
    bundle = fit_digits()
    assert read_process_state() == before
    assert bundle.path == tmp_path / "store" / "digits" / "1"
    assert Bundle(bundle.path).manifest == bundle.manifest
    assert bundle.manifest.test_metrics.accuracy > 0.3
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    assert f"test accuracy {bundle.manifest.test_metrics.accuracy:.4f}" in printed


def test_fit_runs_in_another_thread(tmp_path, fit_digits):
    bundles: list[Bundle] = []
    before = read_process_state()
    thread = threading.Thread(target=lambda: bundles.append(fit_digits()))
    thread.start()
    thread.join(280)
    assert bundles[0].path.is_dir()
    assert read_process_state() == before


def test_ctrl_c_saves_the_state_and_call_and_command_resume(fit_digits, tmp_path, monkeypatch):
    training_step = Classifier.training_step
    interrupted_steps = [5, 8]

    def interrupt(self: Classifier, *arguments: object) -> object:
        if self.trainer.global_step in interrupted_steps:
            interrupted_steps.remove(self.trainer.global_step)
            signal.raise_signal(signal.SIGINT)
        return training_step(self, *arguments)

    monkeypatch.setattr(Classifier, "training_step", interrupt)
    before = read_process_state()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fit_digits()
        assert read_process_state() == before
    assert list((tmp_path / "runs").rglob("step-*.ckpt"))
    assert not (tmp_path / "store" / "digits").exists()

    flags = [f"--{name}={str(value).lower()}" for name, value in QUICK.items()]
    main.run(
        [
            *("run", "digits", "--store", str(tmp_path / "store"), *flags),
            f"--trainer.default_root_dir={tmp_path / 'runs'}",
        ]
    )
    assert Bundle(tmp_path / "store" / "digits" / "latest").manifest.version == 1
    assert [path.name for path in (tmp_path / "runs" / "digits").iterdir()] == ["1"]


@pytest.mark.parametrize(
    ("data", "settings", "words"),
    [
        ("gone", {}, "gone"),
        ("digits", {"trainer.max_epochs": "many"}, "max_epochs"),
        ("digits", {"model.netwrok": "lenet"}, "netwrok"),
        ("digits", {"model.network": "lenet5"}, "lenet5"),
        ("digits", {"data.batch_size": 0}, "batch_size"),
    ],
)
def test_an_error_is_the_line_that_the_command_prints(tmp_path, capsys, data, settings, words):
    runs = {"trainer.default_root_dir": str(tmp_path / "runs")}
    with pytest.raises(ValueError, match=words) as caught:
        fit(data, {**runs, **settings}, store=tmp_path / "store")
    assert not (tmp_path / "store").exists()

    flags = [f"--{name}={value}" for name, value in {**runs, **settings}.items()]
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert main.main(["run", data, f"--store={tmp_path / 'store'}", *flags]) == 2
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
    assert capsys.readouterr().err == f"train: {caught.value}\n"


def test_a_time_budget_reaches_the_run(tmp_path):
    with pytest.raises(ValueError, match="soon"):
        fit("digits", time_budget="soon", store=tmp_path / "store")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trainer.devices": 2, "trainer.accelerator": "cpu"}, "use the command imago train run"),
        ({"export.enabled": False}, "publish no bundle"),
        ({"trainer.fast_dev_run": True}, "publish no bundle"),
    ],
)
def test_settings_that_give_no_bundle_are_refused(fit_digits, settings, words):
    with pytest.raises(ValueError, match=words):
        fit_digits(settings)


def test_a_path_object_is_a_folder_also_without_a_slash(tmp_path, monkeypatch):
    """As text, `digits` names the built-in data."""
    sample_images.write_image_folder(tmp_path / "digits", count=12)
    monkeypatch.chdir(tmp_path)
    settings = {**QUICK, "model.network": "lenet", "data.size": 32}
    bundle = fit(Path("digits"), settings, name="mine", store="store", recipe="digits")
    assert bundle.manifest.classes == sample_images.CLASSES
    assert bundle.manifest.name == "mine"


def test_importing_train_loads_no_torch():
    script = "import train, sys; assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
