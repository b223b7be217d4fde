"""Training through the command line: bundles, recipes, seeds, settings and refused settings."""

import csv
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from train.cli import main
from train.cli.command_line import CommandLine
from train.cli.recipes import RECIPES as RECIPES_DIRECTORY
from train.learning.precision import has_bfloat16
from train.runs.progress_bar import Pace

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:::lightning"),  # advice on workers, intervals and the like
    pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning"),  # of torch.compile
]
ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    str(p.relative_to(RECIPES_DIRECTORY).with_suffix("")) for p in RECIPES_DIRECTORY.rglob("*.yaml")
)
QUICK = ["--export.enabled=false", "--samples.images=0", "--progress.quiet=true"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of three classes with 20 images each, 32x32, one color a class."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for k, name in enumerate(("blue", "green", "red")):
        (root / name).mkdir()
        for i in range(20):
            picture = rng.integers(0, 120, (32, 32, 3), np.uint8)
            picture[:, :, k] += 100
            cv2.imwrite(str(root / name / f"{i}.png"), picture)
    return root


def fit(tmp_path: Path, *flags: str, data: str = "digits", epochs: int = 1) -> CommandLine:
    return main.run(
        [
            "run",
            data,
            *QUICK,
            f"--trainer.default_root_dir={tmp_path / 'runs'}",
            f"--trainer.max_epochs={epochs}",
            "--name=test",
            *flags,
        ]
    )


def test_validate_test_and_predict_use_a_checkpoint(tmp_path, capsys):
    fit(tmp_path, epochs=3)
    checkpoint = next((tmp_path / "runs").rglob("best.ckpt"))
    recipe = [
        f"--config={RECIPES_DIRECTORY / 'digits.yaml'}",
        f"--ckpt_path={checkpoint}",
        "--progress.quiet=true",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    validated = main.run(["validate", *recipe]).trainer.callback_metrics
    tested = main.run(["test", *recipe, "--model.tta=flip"]).trainer.callback_metrics
    assert validated["val/accuracy"] > 0.8
    assert tested["test/accuracy"] > 0.8
    balanced_accuracy = float(tested["test/balanced_accuracy"])
    assert balanced_accuracy == pytest.approx(float(tested["test/accuracy"]), abs=0.05)
    assert 0.1 < tested["test/majority_accuracy"] < 0.12
    assert 0.3 < tested["test_tta/accuracy"] <= 1  # digits have no mirror image, so this is worse
    capsys.readouterr()
    data = main.run(["predict", *recipe]).datamodule
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert len(rows) == data.counts["test"]
    truth = {
        data.dataset.items.name(i): data.classes[data.dataset.labels[i]]
        for i in data.index["test"].tolist()
    }
    right = [truth[row["image"]] == row["label"] for row in rows]
    assert np.mean(right) == pytest.approx(tested["test/accuracy"].item())
    assert all(0.1 < float(row["confidence"]) <= 1 for row in rows)
    main.run(["predict", *recipe, "--trainer.limit_predict_batches=2"])
    assert (
        list(csv.DictReader(capsys.readouterr().out.splitlines()))
        == rows[: 2 * 2 * data.batch_size]
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_for_a_step(tmp_path, photos, recipe):
    command = main.run(
        [
            "run",
            str(photos),
            f"--recipe={recipe}",
            *QUICK,
            "--trainer.fast_dev_run=1",
            f"--trainer.default_root_dir={tmp_path}",
            "--data.size=32",
            "--data.batch_size=8",
            "--data.val_fraction=0.2",
        ]
    )
    assert torch.isfinite(command.trainer.callback_metrics["train/loss"])
    assert torch.isfinite(command.trainer.callback_metrics["val/loss"])


def test_every_recipe_starts_with_a_comment():
    for recipe in RECIPES:
        text = (RECIPES_DIRECTORY / f"{recipe}.yaml").read_text()
        assert text.startswith("# "), recipe


def weights(command: CommandLine) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in command.model.network.parameters()])


@pytest.mark.slow
def test_weights_depend_on_the_seed_only(tmp_path):
    flags = [
        "--data.augment.crop_padding=1",
        "--model.network=speednet",
        "--model.options",
        '{"widths": [8, 16]}',
        "--model.optimizer.name=muon",
        "--trainer.precision=bf16-mixed",
    ]
    first = fit(tmp_path / "1", *flags, "--seed_everything=3")
    again = fit(tmp_path / "2", *flags, "--seed_everything=3")
    other = fit(tmp_path / "3", *flags, "--seed_everything=4")
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))
    assert first.datamodule.index["val"].tolist() != other.datamodule.index["val"].tolist()


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.optimizer.name=sgd", "--model.optimizer.lr=0.05"],
        ["--model.optimizer.name", "adam"],
        [
            "--model.optimizer.name=muon",
            "--model.optimizer.lr=0.1",
            "--model.optimizer.others_lr=0.2",
        ],
        [
            "--model.optimizer.name=muon",
            "--model.optimizer.lr=0.1",
            "--model.optimizer.others=adamw",
            "--model.optimizer.others_lr=0.01",
        ],
        [
            "--trainer.accumulate_grad_batches=2",
            "--model.channels_last=true",
            "--trainer.precision=bf16-mixed",
        ],
        ["--data.augment.mixup=0.2", "--model.weigh_classes=true"],
        ["--data.sampling", "balanced"],
        [
            "--model.schedule.name=linear",
            "--model.schedule.warmup=0.3",
            "--trainer.gradient_clip_val=1",
        ],
        ["--model.schedule.name=step", "--ema.decay=0"],
        ["--trainer.gradient_clip_val=1", "--trainer.precision=bf16-mixed"],
        ["--trainer.precision", "16-mixed"],
        ["--trainer.precision", "bf16-true"],
    ],
    ids=lambda flags: " ".join(word.removeprefix("--") for word in flags[:2]),
)
def test_settings_train(tmp_path, flags):
    command = fit(tmp_path, *flags, "--model.label_smoothing=0", epochs=4)
    assert command.trainer.callback_metrics["val/accuracy"] > 0.7


# On a CPU Lightning has no float16.
MIXED = torch.bfloat16 if has_bfloat16() else torch.float32


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("bf16-true", torch.bfloat16),
        ("bf16-mixed", MIXED),
        ("16-mixed", MIXED),
    ],
)
def test_convolutions_compute_in_the_requested_precision(tmp_path, precision, dtype):
    dtypes: set[tuple[bool, torch.dtype]] = set()

    def record(module: torch.nn.Module, _: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if isinstance(module, torch.nn.Conv2d):
            dtypes.add((module.training, output.dtype))

    hook = register_module_forward_hook(record)
    try:
        # Without the audit, whose model is in float32.
        fit(tmp_path, f"--trainer.precision={precision}", "--audit.enabled=false")
    finally:
        hook.remove()
    assert dtypes == {(True, dtype), (False, dtype)}


def test_the_average_of_the_weights_is_kept(tmp_path):
    command = fit(tmp_path, "--ema.decay=0.9", "--checkpoint.monitor=val/loss", epochs=2)
    checkpoint = torch.load(command.trainer.checkpoint_callback.best_model_path, weights_only=True)
    average = checkpoint["state_dict"]
    current = checkpoint["ema"]["current"]
    name = "network.head.weight"
    assert not torch.equal(average[name], current[name])
    assert torch.equal(average[name], command.model.state_dict()[name].cpu())
    assert torch.equal(average["mean"], current["mean"])


def test_the_average_is_more_precise_than_the_weights(tmp_path):
    """In bfloat16 the small steps of an average would be rounded away."""
    command = fit(
        tmp_path,
        "--trainer.precision=bf16-true",
        "--ema.decay=0.999",
        "--checkpoint.monitor=null",
        epochs=2,
    )
    checkpoint = torch.load(command.trainer.checkpoint_callback.best_model_path, weights_only=True)
    average = checkpoint["state_dict"]["network.head.weight"]
    current = checkpoint["ema"]["current"]["network.head.weight"]
    assert average.dtype == torch.float32
    assert current.dtype == torch.bfloat16
    assert not torch.equal(average, average.bfloat16().float())


def test_overfit_batches_are_the_same_in_every_epoch(tmp_path):
    command = fit(tmp_path, "--trainer.overfit_batches=2")
    assert command.trainer.num_training_batches == 2
    order = command.datamodule.train_dataloader().order
    assert np.array_equal(np.concatenate(order.batches(0)), np.concatenate(order.batches(1)))

    command.trainer.overfit_batches = 0
    order = command.datamodule.train_dataloader().order
    assert not np.array_equal(np.concatenate(order.batches(0)), np.concatenate(order.batches(1)))


def test_the_schedule_rises_and_falls(tmp_path):
    command = fit(tmp_path, "--model.schedule.name=linear", "--model.schedule.warmup=0.5", epochs=1)
    optimizer = command.trainer.optimizers[0]
    steps = command.trainer.global_step
    shares = [command.model.schedule.factor(step, steps) for step in range(steps + 1)]
    assert shares[0] < 0.2
    assert max(shares) <= 1
    assert shares[-1] == 0
    assert shares.index(max(shares)) == pytest.approx(steps / 2, abs=1)
    assert optimizer.param_groups[0]["lr"] == 0


def test_early_stopping_ends_the_run(tmp_path):
    command = fit(
        tmp_path,
        "--early_stopping.patience=1",
        "--early_stopping.monitor=val/accuracy",
        "--early_stopping.min_delta=1",
        epochs=9,
    )
    assert command.trainer.current_epoch == 2


@pytest.mark.parametrize(("metric", "best"), [("val/loss", min), ("val/accuracy", max)])
def test_the_best_epoch_by_the_monitored_metric_is_kept(tmp_path, metric, best):
    fit(tmp_path, f"--checkpoint.monitor={metric}", "--logger=csv", epochs=4)
    (run,) = (tmp_path / "runs/test").iterdir()
    with open(run / "csv/metrics.csv", newline="") as file:
        values = [float(row[metric]) for row in csv.DictReader(file) if row[metric]]
    assert len(set(values)) == len(values) == 4
    assert values[torch.load(run / "best.ckpt", weights_only=True)["epoch"]] == best(values)


def test_early_stopping_by_accuracy_continues_while_it_rises(tmp_path):
    command = fit(
        tmp_path, "--early_stopping.patience=1", "--early_stopping.monitor=val/accuracy", epochs=3
    )
    assert command.trainer.current_epoch == 3


def test_training_starts_from_weights_on_disk(tmp_path):
    first = fit(tmp_path / "1", epochs=5)
    file = tmp_path / "weights.pt"
    torch.save(first.model.network.state_dict(), file)
    tuned = fit(tmp_path / "2", f"--model.weights={file}", "--model.optimizer.lr=1e-5")
    assert tuned.trainer.callback_metrics["val/accuracy"] > 0.85


@pytest.mark.slow  # it calls a C++ compiler
@pytest.mark.timeout(900)
def test_compiling_does_not_rename_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    command = fit(tmp_path, "--model.compile=default", "--trainer.limit_train_batches=2")
    assert "network.head.weight" in command.model.state_dict()
    assert list((tmp_path / "kernels").rglob("*.so"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_speednet_learns_in_bfloat16(tmp_path):
    command = fit(
        tmp_path,
        "--model.compile=default",
        "--trainer.precision=bf16-mixed",
        "--model.network=speednet",
        "--model.options={widths: [16, 32, 32]}",
        "--data.size=32",
        epochs=8,
    )
    assert command.trainer.callback_metrics["val/accuracy"] > 0.8


def test_predictions_are_logged_as_pictures(tmp_path):
    main.run(
        [
            "run",
            "digits",
            "--export.enabled=false",
            "--progress.quiet=true",
            "--trainer.max_epochs=1",
            f"--trainer.default_root_dir={tmp_path}",
            "--name=test",
        ]
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent)).Reload()
    picture = cv2.imdecode(
        np.frombuffer(log.Images("val/predictions")[0].encoded_image_string, np.uint8),
        cv2.IMREAD_COLOR,
    )
    assert picture.shape == (284, 896, 3)
    assert {
        "train/loss",
        "train/accuracy",
        "train/loss_step",
        "train/accuracy_step",
        "val/loss",
        "val/accuracy",
    } <= set(log.Tags()["scalars"])


REFUSED = {
    "an unknown network": (["--model.network", "resnet81"], "did you mean resnet"),
    "an option the network lacks": (["--model.options", '{"width": 3}'], "unknown option 'width'"),
    "an unknown flag": (["--model.dropout", "0.5"], "dropout"),
    "a value of the wrong type": (["--model.label_smoothing", "high"], "label_smoothing"),
    "a learning rate of zero": (["--model.optimizer.lr", "0"], "above 0"),
    "a warm-up above 1": (["--model.schedule.warmup", "5"], "share of all steps"),
    "weights that do not exist": (["--model.weights", "nowhere.pt"], "nowhere.pt: no such file"),
    "an unknown recipe": (["--recipe", "cifar11"], "there are"),
    "accumulated gradients in a recorded step": (
        ["--model.compile=reduce-overhead", "--trainer.accumulate_grad_batches=2"],
        "choose default",
    ),
    "an average that never changes": (["--ema.decay", "1"], "decay"),
    "an unknown optimizer": (["--model.optimizer.name", "lion"], "optimizer"),
    "an augmentation out of range": (
        ["--data.augment.hue", "0.7"],
        "augment.hue: 0.7 is not between 0 and 0.5",
    ),
    "an unknown augmentation": (["--data.augment.flip", "mirror"], "augment.flip"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_settings_are_refused_in_one_line(tmp_path, case):
    flags, word = REFUSED[case]
    with pytest.raises(ValueError, match=word) as error:
        fit(tmp_path, *flags)
    assert "\n" not in str(error.value).strip()
    assert len(str(error.value)) < 400


def test_help_lists_every_setting(commands):
    output = commands.run("run", "--help").text
    assert output == commands.run("fit", "--help").text
    for setting in (
        "--model.network",
        "--data.source",
        "--trainer.precision",
        "--trainer.devices",
        "--trainer.strategy",
        "--trainer.num_nodes",
        "--trainer.accumulate_grad_batches",
        "--store",
        "--name",
        "--ema.decay",
        "--early_stopping.patience",
        "--ckpt_path",
        "--data.augment.mixup",
    ):
        assert setting in output, setting


def test_fit_with_a_recipe_publishes_a_bundle_and_shows_each_step(commands, tmp_path):
    command = commands.run(
        "fit",
        f"--config={RECIPES_DIRECTORY / 'digits.yaml'}",
        f"--store={tmp_path / 'store'}",
        "--trainer.max_epochs=2",
        f"--trainer.default_root_dir={tmp_path / 'runs'}",
        env={"FORCE_COLOR": "1"},  # as on a terminal
    )
    text = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", command.text).replace("\r", "\n")
    epochs = re.findall(r"^epoch (\d)/2  train .*  left \d:\d\d:\d\d$", text, re.MULTILINE)
    assert epochs == ["1", "2"]
    steps = re.findall(r"^step (\d/6)  (\w+)  left \d:\d\d:\d\d$", text, re.MULTILINE)
    assert steps == [
        ("1/6", "test"),
        ("2/6", "calibrate"),
        ("3/6", "export"),
        ("4/6", "quantize"),
        ("5/6", "certify"),
        ("6/6", "report"),
    ]
    for title in ("epoch 1/2", *(f"step {number}  {step}" for number, step in steps)):
        assert re.search(rf"{title} +[━╸╺]+", text), title  # a bar

    manifest = json.loads((tmp_path / "store" / "digits" / "latest" / "manifest.json").read_text())
    assert manifest["metrics"]["test"]["accuracy"] > 0.8
    assert manifest["provenance"]["recipe"]["model"]["network"] == "convnet"


@pytest.mark.parametrize(
    "flags", [(), ("--trainer.enable_progress_bar", "false"), ("--progress.quiet", "true")]
)
def test_progress_can_be_disabled(commands, tmp_path, flags):
    command = commands.run(
        "run",
        "digits",
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=2",
        "--export.enabled=false",
        "--audit.enabled=false",
        f"--trainer.default_root_dir={tmp_path}",
        *flags,
    )
    assert ("epoch 1/1" in command.text) == (not flags)


def test_the_pace_is_that_of_a_recent_window():
    """Neither a slow start nor batches of an earlier start count, and a validation always does."""
    pace = Pace(batches=1000, now=0)  # resumed
    assert pace.measure(1000, now=1) is None
    assert pace.measure(1001, now=30) == 30  # the first batch compiles the network
    for second in range(31, 100):
        pace.measure(1001 + second - 30, second)
    assert pace.measure(1071, now=100) == pytest.approx(1)

    pace.use_window(200)  # epochs of 100 batches in 100 s, and 100 s of validation
    estimates: list[float] = []
    for second in range(100, 1100):
        epoch, in_epoch = divmod(second - 100, 200)
        batches = 1071 + 100 * epoch + min(100, in_epoch)
        estimates.append(pace.measure(batches, second))
    assert estimates[400:] == pytest.approx([2] * 600, rel=0.05)
