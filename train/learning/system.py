"""The system: a network, its loss, metrics, optimizer and schedule.

Lightning runs the loop and calls the hooks, in each training process.
"""

import math
import sys
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from models import networks
from models.networks.pretrained import Preprocessing
from models.networks.weights import HEAD, load_weights
from train.data import ImageData
from train.failures import Diverged
from train.learning.epoch_sums import EpochSums
from train.learning.initial_weights import PRETRAINED, InitialWeights
from train.learning.lightning_loop_state import LightningLoopState
from train.learning.optimizers import OptimizerConfig, build_optimizer
from train.learning.schedules import ScheduleConfig
from train.learning.test_time_augmentation import TestTimeAugmentation, augmented_views
from train.learning.training_images import (
    check_no_training_image_is_scored,
    describe_training_images,
)

# Images uint8, or float in 0..255, [B,C,H,W]; labels int64 [B], or the shares of classes [B,K].
Batch = tuple[Tensor, Tensor]

# Metrics of each epoch by the name they are logged under, and whether less or more is better.
METRICS = {"val/loss": "min", "val/accuracy": "max", "train/loss": "min", "train/accuracy": "max"}

PREPARE_IMAGES = 5000  # training images for networks that compute a layer from data
MIN_UNEQUAL_RATIO = 10.0  # images of the largest class over those of the smallest

ADAMW = OptimizerConfig()
CONSTANT_RATE = ScheduleConfig()


class Classifier(L.LightningModule):
    """Images in 0..255 to logits [B,K].

    The network is built in `setup`, when the number of classes and the size of images are known.

    Args:
        network: name of the network: lenet, convnet, convnet4, speednet or any classification
            model of timm, such as resnet18, or convnext_tiny.in12k_ft_in1k with the tag of its
            pretrained weights.
        options: passed to the network, e.g. {widths: [64, 256, 256]} for speednet, or {stem: small}
            for a model of timm.
        weights: what to start from: pretrained for timm's weights, which come with Imago for
            tf_efficientnet_lite0 and are downloaded once for others; a bundle, as a directory or
            as NAME or NAME/VERSION of the store, also of other classes: those of the same name
            keep their rows of the head; a file: a checkpoint or a state dict of the same network;
            none for random weights.
        optimizer: which optimizer, and its learning rates.
        schedule: learning rate over the steps.
        frozen_share: share of the groups of layers, from the first one on, that are not trained.
            They are not run backwards, which saves a large part of the time of a step. Random
            weights are all trained.
        freeze_batch_norm: use the statistics of batch norms and do not update them: those of
            pretrained weights are better than those of small batches or few images. No effect on
            random weights.
        label_smoothing: share of the label that is spread over all classes, in training.
        weigh_classes: weigh the loss by the inverse frequency of each class, in training; by
            default where the largest class has at least 10 times the images of the smallest, and
            data.sampling is uniform.
        channels_last: use the memory layout in which convolutions are fastest.
        compile: torch.compile the network, in this mode.
        tta: test-time augmentation, reported in addition to the plain figures: flip adds the
            mirror image, shift adds four crops moved by one pixel as well.
    """

    network: networks.Network
    mean: Tensor  # float [1,C,1,1] in 0..255
    std: Tensor  # float [1,C,1,1] in 0..255
    class_weights: Tensor | None  # float [K]

    def __init__(
        self,
        network: str = "lenet",
        options: dict[str, Any] | None = None,
        weights: str | None = None,
        optimizer: OptimizerConfig = ADAMW,
        schedule: ScheduleConfig = CONSTANT_RATE,
        frozen_share: float = 0.0,
        freeze_batch_norm: bool = False,
        label_smoothing: float = 0.0,
        weigh_classes: bool | None = None,
        channels_last: bool = False,
        compile: Literal["off", "default", "reduce-overhead", "max-autotune"] = "off",
        tta: TestTimeAugmentation = "none",
    ):
        super().__init__()
        networks.check_name(network)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(
                f"model.label_smoothing: {label_smoothing} is not in 0..1; it is a share of the "
                "label"
            )

        if not 0 <= frozen_share < 1:
            raise ValueError(
                f"model.frozen_share: {frozen_share} is not in 0..1; it is a share of the layers"
            )

        # Left out: what does not change the model.
        self.save_hyperparameters(ignore=["weights", "channels_last", "compile", "tta"])
        self.name = network
        self.options = options or {}
        self.weights = InitialWeights(weights, network)
        self.is_checkpoint_expected = False
        self.optimizer = optimizer
        self.schedule = schedule
        self.frozen_share = frozen_share
        self.freeze_batch_norm = freeze_batch_norm
        self.label_smoothing = label_smoothing
        self.weigh_classes = weigh_classes
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.compile_mode = compile
        self.tta = tta
        self.sums: dict[str, EpochSums] = {}  # by part, of the current epoch

    @property
    def data(self) -> ImageData:
        """The data module of the trainer that runs this system."""
        data = getattr(self.trainer, "datamodule", None)  # Lightning does not declare it
        assert isinstance(data, ImageData)
        return data

    def expect_checkpoint(self) -> None:
        """Do not load `weights` in `setup`: a checkpoint replaces all of them afterwards."""
        self.is_checkpoint_expected = True

    def find_weights(self, store: str) -> Preprocessing | None:
        """Search for `weights` in this store, too; return how their images were prepared.

        None where that is not known, or the network starts with random weights. Raises ValueError
        where the store has no such bundle.
        """
        self.weights = InitialWeights(self.weights.setting, self.name, store)
        return self.weights.preprocessing()

    def fetch_weights(self) -> None:
        """Download the weights where needed, and check that they can be read.

        Raises ValueError where they can't be had.
        """
        if self.weights and not self.is_checkpoint_expected:
            self.weights.read()

    def use_schedule(self, schedule: ScheduleConfig) -> None:
        """Train with another learning-rate schedule from the next `fit` on."""
        self.schedule = schedule

    def restore_sums(self, totals: dict[str, Tensor]) -> None:
        """Continue an epoch with the sums of each part that a checkpoint holds."""
        for part, values in totals.items():
            self.sums[part] = EpochSums(values.to(self.device))

    def build_network(self, trainer: L.Trainer, data: ImageData) -> None:
        """Build the network before `fit`, for steps that need it earlier, such as the probe."""
        self.trainer = trainer
        trainer.datamodule = data  # type: ignore[attr-defined]  # Lightning sets it in `fit`
        self.setup("fit")

    def setup(self, stage: str) -> None:
        """Build the network for the data and load or prepare its weights."""
        if hasattr(self, "network"):
            return
        data = self.data
        spec = data.input
        if spec.height != spec.width:
            raise ValueError(
                f"data.size: networks take square images, not {spec.width}x{spec.height}"
            )

        self.network = networks.build(
            self.name, len(data.classes), spec.channels, spec.height, **self.options
        )
        self.register_buffer("mean", torch.tensor(data.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(data.std).view(1, -1, 1, 1))
        is_training = stage == "fit"
        class_weights = data.class_weights if self._is_weighing_classes(is_training) else None
        self.register_buffer("class_weights", class_weights, persistent=False)

        if self.weights and not self.is_checkpoint_expected:
            self._load_weights(is_training)
        elif is_training and self.network.prepare:
            self.network.prepare(self.normalize(data.training_images(PREPARE_IMAGES)))

        if is_training:
            if self.weights:
                self._freeze_first_layers()
            self.train()
        self.network.to(memory_format=self.layout)  # type: ignore[call-overload]  # torch's overloads leave it out
        if self.compile_mode != "off":
            # The network and not this module, as self.log does not work in a compiled module.
            self.network.compile(mode=self.compile_mode)

    def _freeze_first_layers(self) -> None:
        groups = self.network.layer_groups()
        count = min(round(self.frozen_share * len(groups)), len(groups) - 1)  # never the head
        for group in groups[:count]:
            for parameter in group:
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> "Classifier":
        """Switch to training, or to evaluation; batch norms that are frozen stay in evaluation."""
        super().train(mode)
        if not mode or not hasattr(self, "network"):
            return self
        for module in self.network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                is_frozen = module.weight is not None and not module.weight.requires_grad
                if is_frozen or (self.freeze_batch_norm and self.weights):
                    module.eval()
        return self

    def _is_weighing_classes(self, is_training: bool) -> bool:
        """Whether the loss is weighed by class; prints a line where the data decides it."""
        if self.weigh_classes is not None:
            return self.weigh_classes
        if not is_training or self.data.sampling == "balanced":
            return False

        weights = self.data.class_weights
        ratio = float(weights.max() / weights[weights > 0].min())
        if ratio < MIN_UNEQUAL_RATIO:
            return False
        if self.trainer.is_global_zero:
            print(
                f"train: the largest class has {ratio:.0f} times the training images of the "
                "smallest, so the loss is weighed by class; --model.weigh_classes false turns it "
                "off",
                file=sys.stderr,
            )
        return True

    def _load_weights(self, is_training: bool) -> None:
        """Load the initial weights, and the mean and deviation of their training, if recorded.

        Raises ValueError for weights of another network, and where tensors are missing or of
        another shape and nothing trains them.
        """
        weights = self.weights.setting
        file = self.weights.read()
        missing = load_weights(self.network, file, self.data.classes)
        mean, std = file.normalization or ([], [])
        if len(mean) == self.mean.numel() and self.data.normalization != "data":
            self.mean.copy_(torch.tensor(mean).view_as(self.mean))
            self.std.copy_(torch.tensor(std).view_as(self.std))

        if not missing:
            return
        names = ", ".join(missing)
        if not is_training:
            raise ValueError(
                f"model.weights: {weights} has no {names} that fit, so those would be random; give "
                "the data (classes, size, channels) that it was trained with"
            )
        is_new_head = weights == PRETRAINED and set(missing) <= set(HEAD)
        if self.trainer.is_global_zero and not is_new_head:
            print(
                f"train: {weights}: loaded all but {names}, which start with random values",
                file=sys.stderr,
            )

    def normalize(self, images: Tensor) -> Tensor:
        """Subtract the mean and divide by the deviation of each channel."""
        return ((images - self.mean) / self.std).contiguous(memory_format=self.layout)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B,K] of images [B,C,H,W] in 0..255."""
        return self.network(self.normalize(images))

    def forward_augmented(self, images: Tensor) -> Tensor:
        """Return the mean logits [B,K] over the views of test-time augmentation."""
        logits: list[Tensor] = []
        for view in augmented_views(images, self.tta):
            # Copied, as with compile: reduce-overhead the next call overwrites the result.
            logits.append(self(view).clone())
        return torch.stack(logits).mean(0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a training batch."""
        images, labels = batch
        logits = self(images)
        loss = cross_entropy(
            logits, labels, weight=self.class_weights, label_smoothing=self.label_smoothing
        )
        self._add_step("train", loss.detach(), logits, labels)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a validation batch to the metrics of the epoch."""
        images, labels = batch
        logits = self(images)
        self._add_step("val", cross_entropy(logits, labels), logits, labels)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a test batch to the metrics, also without leaked images and with augmentation."""
        images, labels = batch
        logits = self(images)
        self._add_step("test", cross_entropy(logits, labels), logits, labels)

        leaked = self.data.leaked_in_test_batch(batch_idx)
        if leaked is not None and not leaked.all():
            clean_logits = logits[~leaked]
            clean_labels = labels[~leaked]
            loss = cross_entropy(clean_logits, clean_labels)
            self._add_step("test_unleaked", loss, clean_logits, clean_labels)

        if self.tta != "none":
            logits = self.forward_augmented(images)
            self._add_step("test_tta", cross_entropy(logits, labels), logits, labels)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return probabilities [B,K]."""
        return self(batch[0]).softmax(1)

    def _add_step(self, part: str, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a step to the sums of a part. Only a step that is logged waits for the device."""
        true_classes = labels.argmax(1) if labels.ndim == 2 else labels
        is_correct = logits.detach().argmax(1) == true_classes
        correct = is_correct.sum()
        if part not in self.sums:
            self.sums[part] = EpochSums.zeros(logits.device)
        self.sums[part].add(loss, correct, len(logits))
        if part != "train":
            self.sums[part].count_classes(true_classes, is_correct, logits.shape[1])

        if LightningLoopState(self.trainer).is_step_logged() and not self.trainer.sanity_checking:
            self.log_dict(
                {f"{part}/loss_step": loss, f"{part}/accuracy_step": correct / len(logits)},
                on_step=True,
                on_epoch=False,
            )
            self.check_finite(part)

    def check_finite(self, part: str) -> None:
        """Raise Diverged, naming the step, when a loss of this epoch is not finite.

        This waits for the device.
        """
        if part in self.sums:
            totals = self.sums[part].totals()
            self._check_finite(part, float(totals[0]), totals)

    def _check_finite(self, part: str, loss: float, process_totals: Tensor) -> None:
        """Raise Diverged for a loss that is not finite.

        `process_totals`, float64 [4]: the sums of this process; the step follows from them.
        """
        if math.isfinite(loss):
            return
        which_loss = f"the {part} loss of epoch {self.trainer.current_epoch + 1}"
        if part == "train":
            which_loss += f" from step {int(process_totals[3]) + 1} on"
        raise Diverged(which_loss, self.optimizer.lr)

    def on_train_epoch_end(self) -> None:
        """Log the training metrics of the epoch."""
        self._log_epoch("train")

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics of the epoch."""
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_epoch("test")
        if len(self.data.leaked_test_rows):
            # All processes take part in the sum, also one that has leaked images only.
            self.sums.setdefault("test_unleaked", EpochSums.zeros(self.device))
        self._log_epoch("test_unleaked")
        self._log_epoch("test_tta")

    def _log_epoch(self, part: str) -> None:
        """Log loss and accuracy of the epoch, over all processes."""
        sums = self.sums.pop(part, None)
        if sums is None:
            return
        process_totals = sums.totals()
        totals = self.trainer.strategy.reduce(process_totals.clone(), reduce_op="sum")
        loss, correct, images, _ = totals.cpu().tolist()

        # After the reduction, so that all processes stop or none does.
        self._check_finite(part, loss, process_totals)
        if not images:
            return
        self.log_dict({f"{part}/loss": loss / images, f"{part}/accuracy": correct / images})
        if part != "train":
            self._log_balanced_accuracy(part, sums)

    def _log_balanced_accuracy(self, part: str, sums: EpochSums) -> None:
        """Log the mean recall of the classes that the part has images of, over all processes.

        Outside of `fit` the accuracy of always predicting the largest class is logged, too.
        """
        class_counts = sums.class_counts(len(self.data.classes))
        class_counts = self.trainer.strategy.reduce(class_counts, reduce_op="sum")
        images, correct = class_counts.cpu()
        has_images = images > 0
        recall = correct[has_images] / images[has_images]
        self.log(f"{part}/balanced_accuracy", recall.mean())
        if self.trainer.state.fn != "fit":
            self.log(f"{part}/majority_accuracy", images.max() / images.sum())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record which images and classes the checkpoint is trained on."""
        checkpoint["classes"] = self.data.classes
        checkpoint["lineage"] = describe_training_images(self.data)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that no image the checkpoint was trained on is scored."""
        command = self.trainer.state.fn
        if "lineage" in checkpoint and command is not None:
            check_no_training_image_is_scored(checkpoint["lineage"], self.data, command.value)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the optimizer and a schedule that changes the rate after each step."""
        # A fused optimizer unscales gradients within its step, too late for clipping: under a mixed
        # precision Lightning refuses the two together.
        is_clipping = bool(self.trainer.gradient_clip_val)
        is_mixed = self.trainer.precision in ("16-mixed", "bf16-mixed")
        fused = not (is_clipping and is_mixed)
        optimizer = build_optimizer(self.network, self.optimizer, fused)

        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            if self.schedule.name != "constant" or self.schedule.warmup:
                raise ValueError(
                    "model.schedule: the number of steps is unknown, as only --trainer.max_time "
                    "ends the run; give --trainer.max_epochs or --trainer.max_steps as well, or "
                    "--model.schedule.name constant with --model.schedule.warmup 0"
                )
            steps = 0  # a constant rate does not depend on it

        scheduler = self.schedule.build_scheduler(optimizer, int(steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
