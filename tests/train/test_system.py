"""Settings of the system and the precision: each has the effect that its description promises."""

from pathlib import Path
from typing import Any

import pytest
import torch

from support.sample_images import write_image_folder
from train.data import Augmentation, ImageData
from train.learning.optimizers import OptimizerConfig
from train.learning.precision import Bfloat16Support, choose_precision
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


class StepRecorder(L.Callback):
    """Records the loss of each step, and the logits and labels that it is computed from."""

    def __init__(self) -> None:
        self.steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, _: int
    ) -> None:
        with torch.no_grad():
            self.logits = pl_module(batch[0])

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.steps.append((outputs["loss"], self.logits, batch[1]))


def make_trainer(steps: int, **settings: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def fit(
    photos: Path,
    batch_size: int = 8,
    steps: int = 1,
    trainer_settings: dict[str, Any] | None = None,
    **model_settings: Any,
) -> tuple[Classifier, L.Trainer, StepRecorder]:
    L.seed_everything(0, verbose=False)
    recorder = StepRecorder()
    trainer = make_trainer(steps, callbacks=[recorder], **trainer_settings or {})
    system = Classifier(**{"network": "convnet", "optimizer": SGD} | model_settings)
    data = ImageData(str(photos), batch_size=batch_size, cache="", workers=0)
    trainer.fit(system, datamodule=data)
    return system, trainer, recorder


def test_loss_weighs_classes_and_smooths_labels(photos):
    system, _, recorder = fit(photos, steps=3, label_smoothing=0.2, weigh_classes=True)

    images_of_class = torch.tensor([14.0, 14, 4])
    weights = images_of_class.mean() / images_of_class
    assert system.class_weights.tolist() == pytest.approx(weights.tolist())
    for loss, logits, labels in recorder.steps:
        targets = 0.8 * torch.eye(3)[labels] + 0.2 / 3
        losses = -(targets * weights * logits.log_softmax(1)).sum(1)
        expected = losses.sum() / weights[labels].sum()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_random_weights_are_all_trained(photos):
    """A recipe for pretrained weights freezes layers and statistics; random ones must change."""
    system, *_ = fit(photos, frozen_share=0.6, freeze_batch_norm=True)
    assert all(parameter.requires_grad for parameter in system.network.parameters())
    assert all(module.training for module in system.network.modules())


@pytest.mark.parametrize("channels_last", [True, False])
def test_channels_last_sets_the_layout_of_kernels_and_images(photos, channels_last):
    system, *_ = fit(photos, channels_last=channels_last)
    kernel = system.network.layers[3].weight
    images = system.normalize(torch.zeros(2, 3, 8, 8))
    assert kernel.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert kernel.is_contiguous() != channels_last
    assert images.is_contiguous(memory_format=torch.channels_last) == channels_last


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
def test_optimizers_are_fused_except_when_clipping_in_mixed_precision(
    photos, name, settings, fused
):
    _, trainer, _ = fit(photos, trainer_settings=settings, optimizer=OptimizerConfig(name))
    assert trainer.optimizers[0].defaults["fused"] == fused


def test_two_accumulated_batches_equal_one_large_batch(photos):
    large, *_ = fit(photos, batch_size=16)
    accumulated, trainer, recorder = fit(
        photos, batch_size=8, trainer_settings={"accumulate_grad_batches": 2}
    )
    small, *_ = fit(photos, batch_size=8)

    assert trainer.global_step == 1
    assert len(recorder.steps) == 2
    for name, value in large.state_dict().items():
        torch.testing.assert_close(accumulated.state_dict()[name], value)
    assert not torch.equal(small.network.head.weight, large.network.head.weight)


@pytest.mark.parametrize(("tta", "count"), [("none", 1), ("flip", 2), ("shift", 10)])
def test_augmented_views_are_distinct_and_as_described(tta, count):
    images = torch.arange(2 * 3 * 6 * 6, dtype=torch.uint8).view(2, 3, 6, 6)

    views = augmented_views(images, tta)

    assert len({view.numpy().tobytes() for view in views}) == len(views) == count
    assert torch.equal(views[0], images)
    originals = views[: max(1, count // 2)]
    mirrored = views[len(originals) :]
    for original, mirror in zip(originals, mirrored, strict=False):
        assert torch.equal(original.flip(3), mirror)
    corners = [(-1, -1), (-1, 1), (1, -1), (1, 1)]
    for view, (y, x) in zip(originals[1:], corners, strict=False):
        assert torch.equal(view[:, :, 1:5, 1:5], images[:, :, 1 + y : 5 + y, 1 + x : 5 + x])


@pytest.mark.parametrize(
    "augment", [Augmentation(), Augmentation(random_resized_crop=0.35, mixup=0.4, cutout=12)]
)
def test_whitening_is_computed_from_images_without_augmentation(tmp_path, augment):
    """The whitened patches are uncorrelated, with variance one."""
    photos = write_image_folder(tmp_path / "photos", 100)
    data = ImageData(str(photos), batch_size=50, cache="", workers=0, augment=augment)
    system = Classifier(
        network="speednet",
        options={"widths": [8, 8]},
        optimizer=OptimizerConfig("sgd", lr=1e-12),
    )
    make_trainer(steps=1).fit(system, datamodule=data)

    with torch.no_grad():
        images = system.normalize(data.training_images(10**6))
        patches = system.network.whiten(images)[:, :12].permute(1, 0, 2, 3).reshape(12, -1)

    assert len(images) == data.counts["train"]
    covariance = torch.cov(patches)
    large = covariance.diag() > 0.5  # directions that hardly vary are not scaled up to one
    assert large.sum() > 6
    expected = torch.eye(int(large.sum()))
    torch.testing.assert_close(covariance[large][:, large], expected, atol=0.3, rtol=0)


OLD_GPU = Bfloat16Support(cpu=True, gpu=False, has_accelerator=True)
NEW_GPU = Bfloat16Support(cpu=False, gpu=True, has_accelerator=True)
OLD_CPU = Bfloat16Support(cpu=False, gpu=None, has_accelerator=False)


@pytest.mark.parametrize(
    ("support", "requested", "accelerator", "used"),
    [
        (OLD_GPU, "bf16-mixed", "auto", "16-mixed"),
        (OLD_GPU, "bf16-mixed", "gpu", "16-mixed"),
        (OLD_GPU, "16-mixed", "gpu", "16-mixed"),
        (OLD_GPU, "bf16-true", "gpu", "bf16-true"),
        (OLD_GPU, None, "auto", None),
        (OLD_GPU, "bf16-mixed", "cpu", "bf16-mixed"),
        (NEW_GPU, "bf16-mixed", "auto", "bf16-mixed"),
        (NEW_GPU, "bf16-mixed", "cpu", "32-true"),
        (OLD_CPU, "bf16-mixed", "auto", "32-true"),
        (OLD_CPU, "32-true", "auto", "32-true"),
    ],
)
def test_precision_is_changed_where_bfloat16_would_be_emulated(
    support, requested, accelerator, used
):
    assert choose_precision(requested, accelerator, support) == used
