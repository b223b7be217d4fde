"""Validation images with their predictions, as one picture for the loggers."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image, ImageDraw, ImageFont

from models.image import decode
from train.data import ImageData
from train.learning.system import Classifier

CELL = 112  # pixels, side of an image in the picture
CAPTION = 30  # pixels, height of the text below it
COLUMNS = 8
FONT_SIZE = 11
MAX_NAME_LENGTH = 12  # characters of a class name


class SamplePredictions(Callback):
    """Logs validation images with their predictions after a validation, in the first process.

    Args:
        images: number of validation images; 0 for none.
        every_epochs: epochs between two pictures.
    """

    def __init__(self, images: int = 16, every_epochs: int = 1):
        if images < 0 or every_epochs < 1:
            raise ValueError("samples: images must be 0 or more and every_epochs 1 or more")
        self.images = images
        self.every_epochs = every_epochs
        self._pixels: np.ndarray | None = None  # uint8 [n,H,W,C]
        self._labels: list[int] = []

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the picture."""
        if not self.images or not trainer.loggers or not trainer.is_global_zero:
            return
        if trainer.sanity_checking or not self._is_due(trainer):
            return

        assert isinstance(pl_module, Classifier)
        data = pl_module.data
        if self._pixels is None:
            self._load_samples(data)
        assert self._pixels is not None

        batch = torch.from_numpy(self._pixels).permute(0, 3, 1, 2).to(pl_module.device)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            probabilities = pl_module(batch).float().softmax(1).cpu().numpy()

        picture = draw_predictions(self._pixels, self._labels, probabilities, data.classes)
        for logger in trainer.loggers:
            log_image(logger, "val/predictions", picture, trainer.global_step)

    def _is_due(self, trainer: L.Trainer) -> bool:
        epoch = trainer.current_epoch + 1
        return epoch % self.every_epochs == 0 or epoch == trainer.max_epochs

    def _load_samples(self, data: ImageData) -> None:
        images: list[np.ndarray] = []
        for _, content, label in data.validation_samples(self.images):
            images.append(decode(content, data.input))
            self._labels.append(label)
        self._pixels = np.stack(images)


def draw_predictions(
    pixels: np.ndarray, labels: list[int], probabilities: np.ndarray, classes: list[str]
) -> np.ndarray:
    """Draw images uint8 [n,H,W,C] in a grid, each above its prediction: uint8 [height,width,3].

    Correct predictions are green. Wrong ones are red, with the true class below.
    """
    columns = min(COLUMNS, len(pixels))
    rows = -(-len(pixels) // columns)
    sheet = Image.new("RGB", (columns * CELL, rows * (CELL + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)

    for i, image in enumerate(pixels):
        x = i % columns * CELL
        y = i // columns * (CELL + CAPTION)
        is_gray = image.shape[2] == 1
        tile = Image.fromarray(image.squeeze(-1) if is_gray else image).convert("RGB")
        tile = tile.resize((CELL - 4, CELL - 4), Image.Resampling.NEAREST)
        sheet.paste(tile, (x + 2, y + 2))

        predicted = int(probabilities[i].argmax())
        caption = f"{_shorten(classes[predicted])} {probabilities[i, predicted]:.2f}"
        color = "darkgreen"
        if predicted != labels[i]:
            caption += f"\nnot {_shorten(classes[labels[i]])}"
            color = "firebrick"
        draw.multiline_text((x + 3, y + CELL), caption, color, font, spacing=1)
    return np.asarray(sheet)


def _shorten(name: str) -> str:
    return name if len(name) <= MAX_NAME_LENGTH else name[: MAX_NAME_LENGTH - 1] + "…"


def log_image(logger: Any, name: str, picture: np.ndarray, step: int) -> None:
    """Send a picture uint8 [H,W,3] to one of Lightning's loggers.

    TensorBoard, W&B and MLflow take images; for others it becomes a PNG file in the log directory.
    """
    kind = type(logger).__name__
    if kind == "TensorBoardLogger":
        logger.experiment.add_image(name, picture, step, dataformats="HWC")
    elif kind == "WandbLogger":
        logger.log_image(name, [picture], step=step)
    elif kind == "MLFlowLogger":
        logger.experiment.log_image(logger.run_id, picture, artifact_file=f"{name}/{step:07d}.png")
    elif logger.log_dir:
        file = Path(logger.log_dir) / name / f"{step:07d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
