"""Each failure is one line that says what to try, and an exit status other than 0."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jsonargparse import Namespace

from models import networks
from support import RANDOM_CONVNET, ROOT
from support.blocked_path import BlockedPath
from support.sample_images import write_image_folder
from support.server import wait_until
from train.cli.command_line import CommandLine
from train.cli.validate_config import validate_config
from train.data import DataError, ImageData
from train.failures import is_out_of_memory
from train.learning.optimizers import OptimizerConfig
from train.learning.schedules import ScheduleConfig
from train.runs.resume import ResumeCheckpoint

NO_OUTPUT = ("--progress.quiet=true", "--audit.enabled=false")
QUIET = ("--logger=none", *NO_OUTPUT)


@pytest.mark.parametrize(
    ("settings", "status", "words"),
    [
        (
            ("--model.optimizer.name=sgd", "--model.optimizer.lr=1e30"),
            1,
            "train: the train loss of epoch 1 from step 2 on is not finite: the training diverged; "
            "try a lower --model.optimizer.lr (it is 1e+30)",
        ),
        (
            ("--logger", "tensorbord"),
            2,
            "train: --logger tensorbord: not one of tensorboard, csv, wandb, mlflow, none",
        ),
        (
            ("--trainer.default_root_dir", "/proc/nowhere"),
            2,
            "train: [Errno 2] No such file or directory: '/proc/nowhere",
        ),
        (("--trainer.precision=16-mixed", "--trainer.accelerator=gpu"), 2, "train: "),
        (("--model.label_smoothing", 1.5), 2, "model.label_smoothing: 1.5 is not in 0..1"),
        (("--model.optimizer.lr", ".inf"), 2, "model.optimizer.lr: inf is not a finite number"),
        (
            ("--model.schedule.milestones", "[50, 75]"),
            2,
            "model.schedule.milestones: [50.0, 75.0] are not in 0..1",
        ),
        (("--early_stopping.patience", -3), 2, "early_stopping.patience: -3 is less than 0"),
        (("--monitor.port", 70000), 2, "monitor.port: 70000 is not between 1 and 65535"),
        (("--resume.notice_seconds", 0), 2, "resume.notice_seconds: 0.0 is not above 0"),
        (
            ("--trainer.max_epochs=-1", "--trainer.max_time=00:00:00:05"),
            2,
            "the number of steps is unknown",
        ),
        (
            ("--model.network=speednet", "--model.options={widths: 64}"),
            2,
            "widths: 64 is not a list",
        ),
        (("--ckpt_path", __file__), 2, "not a checkpoint, or damaged"),
        (
            ("--checkpoint.monitor", "val/acuracy"),
            2,
            "train: checkpoint.monitor: 'val/acuracy' is not one of val/loss, val/accuracy, null",
        ),
    ],
)
def test_invalid_settings_end_with_one_line(commands, tmp_path, settings, status, words):
    command = commands.start("run", "digits", *QUIET, *settings, cwd=tmp_path)
    assert command.status() == status
    *other_lines, last = command.text.splitlines()
    assert words in last
    assert all(line.startswith("data: ") for line in other_lines)


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (
            ResumeCheckpoint,
            {"keep": 0},
            "resume: every_minutes and every_steps must be 0 or more, and keep 1 or more",
        ),
        (OptimizerConfig, {"head_lr": 0.0}, "model.optimizer.head_lr: 0.0 is not above 0"),
        (OptimizerConfig, {"bias_lr": 0.0}, "model.optimizer.bias_lr: 0.0 is not above 0"),
        (OptimizerConfig, {"momentum": 2.0}, "model.optimizer.momentum: 2.0 is not in 0..1"),
        (
            OptimizerConfig,
            {"weight_decay": -1.0},
            "model.optimizer.weight_decay: -1.0 is not 0 or more",
        ),
        (
            ScheduleConfig,
            {"start": -1.0},
            "model.schedule.start: -1.0 is not in 0..1; it is a share of the peak",
        ),
        (ScheduleConfig, {"gamma": -1.0}, "model.schedule.gamma: -1.0 is not above 0"),
    ],
)
def test_a_section_of_settings_refuses_invalid_values(build, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": []}, "widths: [] is not a list"),
        ({"depth": "two"}, "depth: 'two' is not a whole number"),
    ],
)
def test_a_network_refuses_invalid_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        networks.build("speednet", 10, 1, 32, **options)


@pytest.fixture(scope="module")
def digits_settings(tmp_path_factory) -> Namespace:
    """The settings of `fit --data.source digits`. Read only."""
    directory = tmp_path_factory.mktemp("settings")
    flags = ["--data.source=digits", f"--trainer.default_root_dir={directory}"]
    command_line = CommandLine(["fit", *flags])
    return command_line.config["fit"]


@pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)  # Lightning's, once a process
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"data.sampling": "balanced", "model.weigh_classes": True},
            "both compensate for rare classes; choose one",
        ),
        (
            {"early_stopping.monitor": "val/los"},
            "early_stopping.monitor: 'val/los' is not one of val/loss, val/accuracy",
        ),
        (
            {"checkpoint.monitor": "train/loss"},
            "'train/loss' is not one of val/loss, val/accuracy, null",
        ),
        (
            {"checkpoint.monitor": "val/loss", "checkpoint.mode": "max"},
            "checkpoint.mode: max would prefer the worst val/loss",
        ),
        (
            {"early_stopping.mode": "max"},
            "early_stopping.mode: max would prefer the worst val/loss",
        ),
        ({"checkpoint.save_top_k": 2}, "checkpoint.save_top_k: 2 is not supported"),
        ({"checkpoint.save_top_k": -1}, "checkpoint.save_top_k: -1 is not supported"),
        ({"trainer.max_epochs": 0}, "trainer.max_epochs: 0 trains nothing"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(digits_settings, settings, message):
    changed = digits_settings.clone()
    for name, value in settings.items():
        changed[name] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        validate_config("fit", changed)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "train: no command given; the commands are run, audit, find-lr,"),
        (
            ("trian", "digits"),
            "train: 'trian' is not a command; the commands are run, audit, find-lr,",
        ),
        (
            ("find-lr",),
            "train: find-lr: name the data first, e.g. python -m train find-lr digits, or",
        ),
    ],
)
def test_an_unknown_command_is_refused(commands, tmp_path, argv, words):
    command = commands.start(*argv, cwd=tmp_path)
    assert command.status() == 2
    (line,) = command.text.splitlines()
    assert words in line


def test_a_variable_enables_tracebacks(commands, tmp_path):
    settings = "run", "digits", *QUIET, "--model.label_smoothing=1.5"
    plain = commands.start(*settings, env={"IMAGO_TRACEBACK": None}, cwd=tmp_path)
    full = commands.start(*settings, env={"IMAGO_TRACEBACK": "1"}, cwd=tmp_path)
    assert plain.status() == full.status() == 2
    assert "Traceback" not in plain.text
    assert full.text.startswith("Traceback")
    assert full.text.splitlines()[-1] == plain.text.splitlines()[-1]


@pytest.mark.parametrize(
    ("subcommand", "flags", "words"),
    [
        ("validate", (), "train: validate: the weights would be random; give --ckpt_path"),
        ("test", (), "train: test: the weights would be random; give --ckpt_path"),
        ("predict", (), "train: predict: the weights would be random; give --ckpt_path"),
        (
            "test",
            ("--ckpt_path", "damaged.ckpt"),
            "train: --ckpt_path damaged.ckpt: not a checkpoint, or",
        ),
        ("predict", ("--ckpt_path", "nowhere.ckpt"), "nowhere.ckpt"),
    ],
)
def test_random_weights_are_not_evaluated(commands, tmp_path, subcommand, flags, words):
    (tmp_path / "damaged.ckpt").write_bytes(b"PK no checkpoint")
    command = commands.start(
        subcommand,
        "--data.source=digits",
        "--model.network=convnet",
        *NO_OUTPUT,
        *flags,
        cwd=tmp_path,
    )
    assert command.status() == 2
    assert words in command.text.splitlines()[-1]
    assert "Traceback" not in command.text


def test_a_checkpoint_of_another_network_is_refused(commands, tmp_path):
    commands.run(
        "run", "digits", *QUIET, "--trainer.max_epochs=1", "--export.enabled=false", cwd=tmp_path
    )
    command = commands.start(
        "test",
        "--data.source=digits",
        *NO_OUTPUT,
        "--data.size=16",
        f"--ckpt_path={next(tmp_path.rglob('best.ckpt'))}",
        cwd=tmp_path,
    )
    assert command.status() == 2
    assert "best.ckpt: of another network" in command.text.splitlines()[-1]


@pytest.fixture(scope="module")
def elsewhere(commands, tmp_path_factory) -> Path:
    """A directory with photos, and a best.ckpt of another split than the default one."""
    directory = tmp_path_factory.mktemp("elsewhere")
    write_image_folder(directory / "photos", 40)
    commands.run(
        "fit",
        "--data.source=photos",
        *QUIET,
        "--model.network=convnet",
        "--trainer.max_epochs=1",
        "--data.val_fraction=0.15",
        "--data.test_fraction=0.15",
        "--seed_everything=1",
        "--export.enabled=false",
        cwd=directory,
    )
    return directory


def test_missing_weights_are_reported_and_not_evaluated(commands, elsewhere, tmp_path):
    # The weights are for ten classes, and the photos have three.
    torch.save(networks.build("convnet", 10, 3, 8).state_dict(), tmp_path / "ten.pt")
    settings = (
        "--data.source=photos",
        "--data.size=8",
        "--model.network=convnet",
        f"--model.weights={tmp_path / 'ten.pt'}",
        *NO_OUTPUT,
        f"--trainer.default_root_dir={tmp_path}",
    )
    trained = commands.run(
        "fit", *settings, "--trainer.max_epochs=1", "--export.enabled=false", cwd=elsewhere
    )
    assert (
        f"train: {tmp_path / 'ten.pt'}: loaded all but head.weight, head.bias, which start"
        in trained.text
    )
    for subcommand in ("test", "predict"):  # validate runs as test does
        refused = commands.start(subcommand, *settings, cwd=elsewhere)
        assert refused.status() == 2
        assert "ten.pt has no head.weight, head.bias that fit, so" in refused.text.splitlines()[-1]
    best = next(tmp_path.rglob("best.ckpt"))
    assert (
        "ten.pt" not in commands.run("test", *settings, f"--ckpt_path={best}", cwd=elsewhere).text
    )


SPLIT = "--data.val_fraction 0.15 --data.test_fraction 0.15 --seed_everything 1"


@pytest.mark.parametrize(
    ("subcommand", "part"),
    [("test", "24 test"), ("validate", "9 val"), ("predict", "24 test"), ("fit", "9 val")],
)
def test_images_that_a_checkpoint_was_trained_on_are_not_evaluated(
    commands, elsewhere, tmp_path, subcommand, part
):
    settings = (
        subcommand,
        "--data.source=photos",
        "--model.network=convnet",
        "--progress.quiet=true",
        f"--ckpt_path={next(elsewhere.rglob('best.ckpt'))}",
        f"--trainer.default_root_dir={tmp_path}",
    )
    refused = commands.start(*settings, cwd=elsewhere)
    assert refused.status() == 2
    last = refused.text.splitlines()[-1]
    assert re.search(
        rf"trained on [1-9]\d* of the {part} images, such as (red|green|blue)/0\d\d.png: ", last
    )
    assert last.endswith(f"the split is another; give the recipe it was trained with, or {SPLIT}")
    if subcommand != "fit":
        assert "WARNING" not in commands.run(*settings, *SPLIT.split(), cwd=elsewhere).text


def test_changed_data_is_refused_and_new_data_is_evaluated(commands, elsewhere, tmp_path):
    settings = (
        "test",
        "--model.network=convnet",
        *NO_OUTPUT,
        f"--ckpt_path={next(elsewhere.rglob('best.ckpt'))}",
        *SPLIT.split(),
        "--data.source",
    )
    new = commands.run(
        *settings, write_image_folder(tmp_path / "new", 20, first=100), cwd=elsewhere
    )
    assert "WARNING: other data than the checkpoint was trained with (photos, " in new.text
    assert "none of the test images was used to train it" in new.text
    changed = shutil.copytree(elsewhere / "photos", tmp_path / "photos")
    for i in range(20):  # others come into the test part
        (changed / f"red/{i:03d}.png").unlink()
    refused = commands.start(*settings, changed, cwd=elsewhere)
    assert refused.status() == 2
    assert "its images, labels or classes are not those of photos" in refused.text.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("evaluating", "flag"),
    [
        (False, "--data.batch_size 647,"),
        pytest.param(True, "--data.eval_batch_size 72", marks=pytest.mark.slow),
    ],
)
def test_out_of_memory_names_the_batch_size_to_try(commands, tmp_path, evaluating, flag):
    sizes = ["--data.batch_size=1294"]
    if evaluating:
        sizes = ["--data.batch_size=2", "--data.eval_batch_size=144"]
    command = commands.start(
        "run",
        "digits",
        *QUIET,
        *sizes,
        "--data.size=256",
        f"--data.cache={tmp_path / 'cache'}",
        "--model.network=vgg11",
        "--trainer.limit_train_batches=1",
        cwd=tmp_path,
        limits={"RLIMIT_AS": 6 << 30},
    )
    assert command.status() == 1
    last = command.text.splitlines()[-1]
    assert last.startswith("train: out of memory on cpu with batches of ")
    assert f"; try {flag}" in last + ","
    assert "Traceback" not in command.text


@pytest.mark.parametrize(
    ("words", "memory"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`", False),
    ],
)
def test_out_of_memory_errors_of_cuda_libraries_are_known(words, memory):
    assert is_out_of_memory(RuntimeError(words)) == memory


def test_a_run_that_fails_to_start_leaves_no_directory(commands, tmp_path):
    refused = commands.start(
        "run",
        f"{tmp_path}/nowhere",
        *RANDOM_CONVNET,
        f"--trainer.default_root_dir={tmp_path / 'runs'}",
        f"--store={tmp_path / 'store'}",
    )
    assert refused.status() == 2
    assert "nowhere: no such folder" in refused.text
    assert not list(tmp_path.iterdir())


def test_a_user_without_home_directory_has_no_cache(monkeypatch, capsys):
    """As in a container that runs as any user."""
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert ImageData("digits").cache is None
    assert (
        "decoded images are not cached: ~/.cache: this user has no home" in capsys.readouterr().err
    )
    with pytest.raises(DataError, match="~/photos: this user has no home directory; set HOME"):
        ImageData("~/photos").setup()


def test_sigterm_is_handled_before_the_imports_are_done(tmp_path):
    """Without a handler, the first process of a container ignores it; others end with -15."""
    blocked_path = BlockedPath(tmp_path / "hang", Path(torch.__file__).with_name("__pycache__"))
    with blocked_path.blocked():
        process = subprocess.Popen(
            [sys.executable, "-m", "train", "--help"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **blocked_path.env},
        )
        wait_until(blocked_path.is_reached)
        process.terminate()
        assert process.wait(60) == 143


# Takes the place of Python in a virtual environment: a training that saves before it ends.
INTERRUPTED_PYTHON = """#!{python}
import os, signal, sys, time
from pathlib import Path

directory = Path(sys.argv[0]).parent

def end(signum, frame):
    time.sleep(0.1)
    (directory / "saved").touch()
    sys.exit(128 + signum)

signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
(directory / "pid").write_text(str(os.getpid()))
(directory / "pid").rename(directory / "started")
time.sleep(60)
"""


@pytest.mark.parametrize("target", ["train", "serve"])
@pytest.mark.parametrize(
    ("signum", "receiver"),
    [
        (signal.SIGTERM, "make"),
        (signal.SIGTERM, "group"),
        (signal.SIGTERM, "command"),
        (signal.SIGINT, "group"),
    ],
)
def test_make_ends_by_the_signal_that_interrupted_the_training(tmp_path, signum, receiver, target):
    """A shell shows 143 or 130. By itself make would end with 2, or before its command."""
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    python = bin_directory / "python"
    python.write_text(INTERRUPTED_PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    shutil.copy(ROOT / "docker/train.lock", tmp_path / ".train.lock")  # nothing to install
    make = subprocess.Popen(
        ["make", target, f"VENV={tmp_path}", f"STORE={tmp_path / 'store'}"],
        cwd=ROOT,
        process_group=0,
        stderr=subprocess.DEVNULL,
        # A shell that starts the tests in the background makes them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    started = bin_directory / "started"
    wait_until(started.exists)

    if receiver == "make":
        make.send_signal(signum)
    elif receiver == "group":
        os.killpg(make.pid, signum)
    else:
        os.kill(int(started.read_text()), signum)

    is_nested = target == "serve" and receiver == "command"
    assert make.wait(30) == (2 if is_nested else -signum)
    wait_until((bin_directory / "saved").exists)


@pytest.mark.slow
@pytest.mark.parametrize("subcommand", ["test", "run"])
def test_out_of_memory_is_one_line_in_every_command_and_in_the_export(
    commands, tmp_path, subcommand
):
    torch.save(networks.build("convnet", 10, 1, 512).state_dict(), tmp_path / "weights.pt")
    data = ("digits",) if subcommand == "run" else ("--data.source", "digits")
    command = commands.start(
        subcommand,
        *data,
        *NO_OUTPUT,
        "--model.network=convnet",
        "--model.weights=weights.pt",
        "--data.size=512",
        "--data.batch_size=2",
        "--data.eval_batch_size=400",
        "--data.cache=",
        "--trainer.limit_val_batches=0",
        "--trainer.limit_train_batches=1",
        "--trainer.max_epochs=1",
        cwd=tmp_path,
        limits={"RLIMIT_AS": 6 << 30},
    )
    assert command.status() == 1, command.text
    assert command.text.splitlines()[-1] == (
        "train: out of memory on cpu with batches of 400 in validation and test; "
        "try --data.eval_batch_size 200"
    )
    assert "Traceback" not in command.text


def test_an_unknown_key_in_a_recipe_is_refused_with_status_2(commands, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data:\n  source: digits\nmodel:\n  netwrok: lenet\n")
    refused = commands.start("fit", f"--config={recipe}", f"--store={tmp_path / 'store'}")
    assert refused.status() == 2
    assert len(refused.text.strip().splitlines()) == 1
    assert "netwrok" in refused.text
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--name", "My-Photos"], "can't name a model"),
        (["--store", "{}/file/store"], "can't be created"),
        (["--export.sign_key", "{}/file"], "not a usable private key"),
    ],
)
def test_nothing_is_trained_where_no_bundle_can_be_written(commands, tmp_path, flags, word):
    (tmp_path / "file").touch()
    refused = commands.start(
        "run",
        "digits",
        f"--trainer.default_root_dir={tmp_path / 'runs'}",
        f"--store={tmp_path / 'store'}",
        *[flag.format(tmp_path) for flag in flags],
    )
    assert refused.status() == 2
    assert word in refused.text.splitlines()[-1]
    assert not (tmp_path / "runs").exists()
