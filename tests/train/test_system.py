"""Knobs of the training that a run would not miss at once: each does what it says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.sample_images import write_image_folder

from train.data import Augmentation, ImageData
from train.learning import precision
from train.learning.optimizers import OptimizerConfig
from train.learning.system import Classifier
from train.learning.test_time_augmentation import augmented_views

import lightning as L  # isort: skip  (it needs what train declares beside a CPU torch)

pytestmark = pytest.mark.filterwarnings("ignore:::lightning")
SGD = OptimizerConfig("sgd", lr=0.1, momentum=0.9)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Twenty images of two classes and six of the third."""
    root = write_image_folder(tmp_path_factory.mktemp("system") / "photos", 20)
    for path in sorted((root / "red").iterdir())[6:]:
        path.unlink()
    return root


class Losses(L.Callback):
    """The loss of each step, and the logits and labels that it is made of."""

    def __init__(self) -> None:
        self.steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.steps.append((outputs["loss"], self.logits, batch[1]))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, _: int
    ) -> None:
        with torch.no_grad():
            self.logits = pl_module(batch[0])


def train(
    photos: Path,
    batch_size: int = 8,
    steps: int = 1,
    trainer: dict[str, Any] | None = None,
    **model: Any,
) -> tuple[Classifier, L.Trainer, Losses]:
    L.seed_everything(0, verbose=False)
    seen = Losses()
    run = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[seen],
        **trainer or {},
    )
    system = Classifier(**{"network": "convnet", "optimizer": SGD} | model)
    run.fit(system, datamodule=ImageData(str(photos), batch_size=batch_size, cache="", workers=0))
    return system, run, seen


def test_the_loss_weighs_classes_and_smooths_labels(photos):
    system, _, seen = train(photos, steps=3, label_smoothing=0.2, weigh_classes=True)
    weights = torch.tensor(32 / 3) / torch.tensor(
        [14.0, 14, 4]
    )  # images a class on average, over its own
    assert system.class_weights.tolist() == pytest.approx(weights.tolist())
    for loss, logits, labels in seen.steps:
        wanted = 0.8 * torch.eye(3)[labels] + 0.2 / 3
        each = -(wanted * weights * logits.log_softmax(1)).sum(1)
        assert loss.item() == pytest.approx((each.sum() / weights[labels].sum()).item(), rel=1e-5)


@pytest.mark.parametrize("chosen", [True, False])
def test_convolutions_lie_in_memory_as_asked(photos, chosen):
    system, *_ = train(photos, channels_last=chosen)
    kernel = system.network.layers[3].weight
    assert kernel.is_contiguous(memory_format=torch.channels_last) == chosen
    assert kernel.is_contiguous() != chosen
    assert (
        system.normalize(torch.zeros(2, 3, 8, 8)).is_contiguous(memory_format=torch.channels_last)
        == chosen
    )


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize(
    ("settings", "fused"),
    [
        ({}, True),
        ({"gradient_clip_val": 1.0}, True),
        ({"precision": "bf16-mixed"}, True),
        ({"gradient_clip_val": 1.0, "precision": "bf16-mixed"}, False),
    ],
)
def test_optimizers_are_fused_but_where_lightning_must_clip_before(photos, name, settings, fused):
    _, run, _ = train(photos, trainer=settings, optimizer=OptimizerConfig(name))
    assert run.optimizers[0].defaults["fused"] == fused


def test_two_small_batches_are_one_large_one(photos):
    once, *_ = train(photos, batch_size=16)
    twice, run, seen = train(photos, batch_size=8, trainer={"accumulate_grad_batches": 2})
    assert (run.global_step, len(seen.steps)) == (1, 2)
    first, *_ = train(photos, batch_size=8)
    for name, value in once.state_dict().items():
        torch.testing.assert_close(twice.state_dict()[name], value)
    assert not torch.equal(first.network.head.weight, once.network.head.weight)


@pytest.mark.parametrize(("tta", "count"), [("none", 1), ("flip", 2), ("shift", 10)])
def test_test_time_augmentation_looks_so_many_times(tta, count):
    images = torch.arange(2 * 3 * 6 * 6, dtype=torch.uint8).view(2, 3, 6, 6)
    found = augmented_views(images, tta)
    assert len({view.numpy().tobytes() for view in found}) == len(found) == count
    assert torch.equal(found[0], images)
    half = found[: max(1, count // 2)]
    assert all(
        torch.equal(view.flip(3), other)
        for view, other in zip(half, found[len(half) :], strict=False)
    )
    for view, (y, x) in zip(half[1:], [(-1, -1), (-1, 1), (1, -1), (1, 1)], strict=False):
        assert torch.equal(view[:, :, 1:5, 1:5], images[:, :, 1 + y : 5 + y, 1 + x : 5 + x])


@pytest.mark.parametrize(
    "augment", [Augmentation(), Augmentation(random_resized_crop=0.35, mixup=0.4, cutout=12)]
)
def test_the_whitening_is_of_images_as_they_are(tmp_path, augment):
    """Whatever training shows of them: patches come out uncorrelated, with variance one."""
    data = ImageData(
        str(write_image_folder(tmp_path / "photos", 100)),
        batch_size=50,
        cache="",
        workers=0,
        augment=augment,
    )
    system = Classifier(
        network="speednet", options={"widths": [8, 8]}, optimizer=OptimizerConfig("sgd", lr=1e-12)
    )
    L.Trainer(
        accelerator="cpu",
        max_steps=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(system, datamodule=data)
    with torch.no_grad():
        images = system.normalize(data.examples(10**6))
        answers = system.network.whiten(images)[:, :12].permute(1, 0, 2, 3).reshape(12, -1)
    assert len(images) == data.counts["train"]
    covariance = torch.cov(answers)
    large = covariance.diag() > 0.5  # what hardly varies is not blown up to one
    assert large.sum() > 6
    torch.testing.assert_close(
        covariance[large][:, large], torch.eye(int(large.sum())), atol=0.3, rtol=0
    )


@pytest.mark.parametrize(
    ("asked", "accelerator", "given"),
    [
        ("bf16-mixed", "auto", "16-mixed"),
        ("bf16-mixed", "gpu", "16-mixed"),
        ("16-mixed", "gpu", "16-mixed"),
        ("bf16-true", "gpu", "bf16-true"),
        (None, "auto", None),
    ],
)
def test_a_gpu_that_would_emulate_bfloat16_computes_in_float16(
    monkeypatch, asked, accelerator, given
):
    for place, name in ((torch.accelerator, "is_available"), (torch.cuda, "is_available")):
        monkeypatch.setattr(place, name, lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation
    )
    precision.gpu_has_bfloat16.cache_clear()
    assert precision.choose_precision(asked, accelerator) == given
    precision.gpu_has_bfloat16.cache_clear()
