"""The system: a network, its loss, metrics, optimizer and schedule. Lightning runs the loop."""

import math
import sys
from dataclasses import asdict
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.functional import cross_entropy

from models import networks
from models.networks.weights import find_weights_file, load_weights, read_normalization
from train.data import ImageData
from train.failures import Diverged
from train.learning import training_images
from train.learning.lightning_loop_state import LightningLoopState
from train.learning.optimizers import OptimizerConfig, build_optimizer
from train.learning.schedules import ScheduleConfig
from train.learning.test_time_augmentation import augmented_views

Batch = tuple[
    Tensor, Tensor
]  # images uint8 or float 0..255 [B,C,H,W]; labels int64 [B] or shares [B,K]
ADAMW, CONSTANT = OptimizerConfig(), ScheduleConfig()
# Of each epoch, by the names they are logged by, and whether less or more is better.
METRICS = {"val/loss": "min", "val/accuracy": "max", "train/loss": "min", "train/accuracy": "max"}
PREPARE_IMAGES = 5000  # training images that a network which fixes a layer from data gets to see


class Classifier(L.LightningModule):
    """Images in 0..255 to logits [B,K]; the network is built in `setup`, when the data says what it needs."""

    network: networks.Network
    mean: Tensor  # float [1,C,1,1] in 0..255, as `std`
    std: Tensor
    class_weights: Tensor | None  # float [K]

    def __init__(
        self,
        network: str = "lenet",
        options: dict[str, Any] | None = None,
        weights: str | None = None,
        optimizer: OptimizerConfig = ADAMW,
        schedule: ScheduleConfig = CONSTANT,
        label_smoothing: float = 0.0,
        weigh_classes: bool = False,
        channels_last: bool = False,
        compile: Literal["off", "default", "reduce-overhead", "max-autotune"] = "off",
        tta: Literal["none", "flip", "shift"] = "none",
    ):
        """
        Args:
            network: name of the network: lenet, convnet, convnet4, speednet or any classification model of torchvision.
            options: passed to the network, e.g. {widths: [64, 256, 256]} for speednet.
            weights: file of weights to start from: a bundle's weights.safetensors or a torch state dict; imagenet for
                torchvision's, downloaded once.
            optimizer: which one, and its learning rates.
            schedule: learning rate over the steps.
            label_smoothing: share of the label that goes to all classes alike, in training.
            weigh_classes: weigh the loss by the inverse frequency of each class, in training.
            channels_last: memory layout that convolutions like best.
            compile: torch.compile the network, in this mode.
            tta: test-time augmentation, reported beside the plain figures: flip adds the mirror image, shift adds
                four crops moved by one pixel as well.
        """
        super().__init__()
        networks.check_name(network)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(
                f"model.label_smoothing: {label_smoothing} is not in 0..1; it is a share of the label"
            )
        self.save_hyperparameters(
            ignore=["weights", "channels_last", "compile", "tta"]
        )  # those are not the model's
        self.name, self.options, self.weights = network, options or {}, weights
        self.optimizer, self.schedule = optimizer, schedule
        self.label_smoothing, self.weigh_classes = label_smoothing, weigh_classes
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.compile_mode, self.tta = compile, tta
        self.sums: dict[str, EpochSums] = {}  # by part

    @property
    def data(self) -> ImageData:
        """The data module of the trainer that runs this system."""
        data = getattr(self.trainer, "datamodule", None)  # Lightning does not declare it
        assert isinstance(data, ImageData)
        return data

    def expect_checkpoint(self) -> None:
        """Do not load `weights` in `setup`: a checkpoint is going to provide all of them."""
        self.weights = None

    def use_schedule(self, schedule: ScheduleConfig) -> None:
        """Train with another learning-rate schedule from the next `fit` on."""
        self.schedule = schedule

    def setup(self, stage: str) -> None:
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
        weights = data.class_weights if self.weigh_classes else None
        self.register_buffer("class_weights", weights, persistent=False)
        if self.weights:
            self._load(self.weights, training=stage == "fit")
        elif stage == "fit" and self.network.prepare:
            self.network.prepare(self.normalize(data.examples(PREPARE_IMAGES)))
        self.network.to(memory_format=self.layout)  # type: ignore[call-overload]  # torch's overloads leave it out
        if self.compile_mode != "off":
            self.network.compile(
                mode=self.compile_mode
            )  # the network, not this module: self.log breaks inside

    def _load(self, weights: str, training: bool) -> None:
        """From a file. Raises ValueError where tensors that it lacks, or has in other shapes, would be scored."""
        file = find_weights_file(weights, self.name)
        lacking = [
            name
            for name in load_weights(self.network, file)
            if not name.endswith("num_batches_tracked")
        ]  # which no answer depends on
        known = read_normalization(file)
        if (
            known and len(known[0]) == self.mean.numel()
        ):  # the weights go with what they were trained on
            for buffer, values in zip((self.mean, self.std), known, strict=True):
                buffer.copy_(torch.tensor(values).view_as(buffer))
        if not lacking:
            return
        names = ", ".join(lacking[:4]) + (
            f" and {len(lacking) - 4} more" if len(lacking) > 4 else ""
        )
        if not training:
            raise ValueError(
                f"model.weights: {weights} has no {names} that fit, so those would be random; give the "
                "data (classes, size, channels) that it was trained with"
            )
        if self.trainer.is_global_zero:
            print(
                f"train: {weights}: all but {names} is taken from there; these begin at random",
                file=sys.stderr,
            )

    def normalize(self, images: Tensor) -> Tensor:
        return ((images - self.mean) / self.std).contiguous(memory_format=self.layout)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.normalize(images))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = cross_entropy(
            logits, labels, weight=self.class_weights, label_smoothing=self.label_smoothing
        )
        self._count("train", loss.detach(), logits, labels, batch_idx)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self._count("val", cross_entropy(logits, labels), logits, labels, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self._count("test", cross_entropy(logits, labels), logits, labels, batch_idx)
        leaked = self.data.leaked(batch_idx)
        if leaked is not None and not leaked.all():
            own, truth = logits[~leaked], labels[~leaked]
            self._count("test_unleaked", cross_entropy(own, truth), own, truth, batch_idx)
        if self.tta != "none":
            logits = self.augmented(images)
            self._count("test_tta", cross_entropy(logits, labels), logits, labels, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probabilities [B,K]."""
        return self(batch[0]).softmax(1)

    def augmented(self, images: Tensor) -> Tensor:
        """Mean logits over the views of test-time augmentation."""
        # Copies, as with compile: reduce-overhead each answer lies where the next one will be written.
        return torch.stack([self(view).clone() for view in augmented_views(images, self.tta)]).mean(
            0
        )

    def _count(self, part: str, loss: Tensor, logits: Tensor, labels: Tensor, step: int) -> None:
        """Add to the part's sums on the device. Nothing waits for the device here, save where a step is logged."""
        right = (
            logits.detach().argmax(1) == (labels.argmax(1) if labels.ndim == 2 else labels)
        ).sum()
        if part not in self.sums:
            self.sums[part] = EpochSums(torch.zeros(4, dtype=torch.float64, device=logits.device))
        self.sums[part].add(loss, right, len(logits))
        is_logged = LightningLoopState(self.trainer).is_step_logged()
        if is_logged and not self.trainer.sanity_checking:
            self.log_dict(
                {f"{part}/loss_step": loss, f"{part}/accuracy_step": right / len(logits)},
                on_step=True,
                on_epoch=False,
            )
            self.check_finite(part)

    def check_finite(self, part: str) -> None:
        """Raise Diverged, naming the step, when a loss of this epoch was no number. This waits for the device."""
        if part in self.sums:
            own = self.sums[part].totals()
            self._check(part, float(own[0]), own)

    def _check(self, part: str, loss: float, own: Tensor) -> None:
        """`own`: the totals of this process."""
        if not math.isfinite(loss):
            where = f"the {part} loss of epoch {self.trainer.current_epoch + 1}"
            if part == "train":
                where += f" from step {int(own[3]) + 1} on"
            raise Diverged(where, self.optimizer.lr)

    def _report(self, part: str) -> None:
        """Log loss and accuracy of the epoch, over all processes."""
        sums = self.sums.pop(part, None)
        if sums is not None:
            own = sums.totals()
            total = self.trainer.strategy.reduce(own.clone(), reduce_op="sum")
            loss, right, count, _ = total.cpu().tolist()
            self._check(part, loss, own)  # then all processes stop, or none
            if count:
                self.log_dict({f"{part}/loss": loss / count, f"{part}/accuracy": right / count})

    def on_train_epoch_end(self) -> None:
        self._report("train")

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")
        if len(self.data.leaked_test):  # all processes sum up, also one whose images are all leaked
            self.sums.setdefault(
                "test_unleaked", EpochSums(torch.zeros(4, dtype=torch.float64, device=self.device))
            )
        self._report("test_unleaked")
        self._report("test_tta")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lineage"] = training_images.describe(self.data)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        command = self.trainer.state.fn
        if "lineage" in checkpoint and command is not None:
            training_images.check(checkpoint["lineage"], self.data, command.value)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        # A fused optimizer unscales gradients in its step, too late for clipping: under a mixed precision Lightning
        # refuses the two together.
        clips = bool(self.trainer.gradient_clip_val) and self.trainer.precision in (
            "16-mixed",
            "bf16-mixed",
        )
        optimizer = build_optimizer(self.network, self.optimizer, fused=not clips)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            if self.schedule.name != "constant" or self.schedule.warmup:
                raise ValueError(
                    "model.schedule: a run that only time ends has no shares of steps; give "
                    "--trainer.max_epochs or --trainer.max_steps beside --trainer.max_time, or "
                    "--model.schedule.name constant with --model.schedule.warmup 0"
                )
            steps = 0  # the constant rate asks for none
        scheduler = self.schedule.build_scheduler(optimizer, int(steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def recipe(self) -> dict[str, Any]:
        """What was asked for, as plain values, for the record."""
        return {
            "network": self.name,
            "options": self.options,
            "optimizer": asdict(self.optimizer),
            "schedule": asdict(self.schedule),
            "label_smoothing": self.label_smoothing,
            "weights": self.weights,
        }


class EpochSums:
    """What an epoch comes to so far, summed up on the device.

    A step only keeps what it has; some dozens are added up at once, in their order. Adding each by itself takes
    fifteen small operations a step, which a small network feels.
    """

    AT_ONCE = 64

    def __init__(self, totals: Tensor):
        """`totals`, float64 [4]: what there is already, see `totals()`."""
        self._totals, self._size = totals, 0
        self._steps: list[tuple[Tensor, Tensor]] = []

    def add(self, loss: Tensor, right: Tensor, size: int) -> None:
        """A step's mean loss [] and number of right answers [] among `size` images."""
        if size != self._size or len(self._steps) == self.AT_ONCE:
            self.totals()
        self._size = size
        self._steps.append((loss, right))

    def totals(self) -> Tensor:
        """float64 [4]: loss, right answers, images, and steps while the loss was finite."""
        if self._steps:
            losses, right = (
                torch.stack(values).double() for values in zip(*self._steps, strict=True)
            )
            terms, count = torch.cat([self._totals[:1], losses * self._size]), len(self._steps)
            # One by one on the CPU, which makes it the same whenever it is asked for. A GPU has no such sum that is
            # deterministic.
            loss = (
                terms.cumsum(0)[-1:] if terms.device.type == "cpu" else terms.sum(0, keepdim=True)
            )
            bad = terms.isfinite().logical_not().int()
            finite = torch.where(bad.any(), bad.argmax().sub(1).clamp_min(0), count).double()
            added = torch.stack([right.sum(), torch.full_like(finite, self._size * count), finite])
            self._totals = torch.cat([loss, self._totals[1:] + added])
            self._steps.clear()
        return self._totals
