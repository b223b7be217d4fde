"""The commands validate, test and predict: they run a checkpoint on one part of the data."""

import csv
import sys
from typing import Any

from torch import Tensor

from train.cli.command_line import CommandLine
from train.runs.distributed import gather_rows

Row = tuple[int, str, str, str]  # position of the image, its name, predicted class, probability


def run_evaluation(command_line: CommandLine) -> None:
    """Run one of the commands validate, test and predict."""
    settings = command_line.settings
    command_line.find_weights()
    if settings.ckpt_path:
        command_line.model.expect_checkpoint()

    if command_line.subcommand == "predict":
        print_predictions(command_line)
        return
    trainer = command_line.trainer
    evaluate = trainer.validate if command_line.subcommand == "validate" else trainer.test
    evaluate(
        command_line.model,
        datamodule=command_line.datamodule,
        ckpt_path=settings.ckpt_path,
        verbose=settings.verbose,
        weights_only=settings.weights_only,
    )


def print_predictions(command_line: CommandLine) -> None:
    """Print the predictions for the test part as CSV: image, predicted class, its probability."""
    trainer = command_line.trainer
    data = command_line.datamodule
    settings = command_line.settings
    batches: Any = trainer.predict(
        command_line.model,
        datamodule=data,
        return_predictions=settings.return_predictions,
        ckpt_path=settings.ckpt_path,
        weights_only=settings.weights_only,
    )
    probabilities: list[Tensor] = []  # [K] of each image
    for batch in batches or []:
        probabilities += batch

    # limit_predict_batches may leave out the last images.
    positions = data.index["test"][trainer.global_rank :: trainer.world_size].tolist()
    rows: list[Row] = []
    for position, row in zip(positions, probabilities, strict=False):
        confidence, index = row.max(0)
        name = data.dataset.items.name(position)
        rows.append((position, name, data.classes[int(index)], f"{confidence:.4f}"))

    all_rows = sorted(gather_rows(trainer, rows))
    if trainer.is_global_zero:
        writer = csv.writer(sys.stdout)
        writer.writerow(("image", "label", "confidence"))
        writer.writerows(row[1:] for row in all_rows)
