"""The learning-rate finder and the batch-size finder, from the command line."""

import re

import torch

from models import networks


def parse_rates(text: str) -> list[tuple[float, float]]:
    """Return the printed pairs of learning rate and loss."""
    rows: list[tuple[float, float]] = []
    for line in text.splitlines():
        if re.fullmatch(r"\s+[\d.e+-]+\s+[\d.]+", line):
            rate, loss = line.split()
            rows.append((float(rate), float(loss)))
    return rows


def parse_speeds(text: str) -> dict[int, float]:
    """Return the printed images a second by batch size."""
    speeds: dict[int, float] = {}
    for line in text.splitlines():
        if line.endswith("-"):  # the memory, which is not known on a CPU
            size, speed, _ = line.split()
            speeds[int(size)] = float(speed.replace(",", ""))
    return speeds


def test_the_suggested_learning_rate_lies_where_the_loss_falls(commands, tmp_path):
    text = commands.run("find-lr", "digits", "--logger=none", cwd=tmp_path).text
    rows = parse_rates(text)
    assert len(rows) >= 10
    first_rate, first_loss = rows[0]
    best_rate, lowest_loss = min(rows, key=lambda row: row[1])
    assert first_rate < 1e-5
    assert lowest_loss < 1.5 < first_loss

    last_line = text.splitlines()[-1]
    suggested_rate = float(re.match(r"--model.optimizer.lr (\S+)  \(", last_line)[1])
    assert first_rate < suggested_rate < best_rate
    assert not list(tmp_path.iterdir())  # a trial writes no files


def test_a_loss_that_is_never_finite_ends_the_search_for_a_learning_rate(commands, tmp_path):
    weights = networks.build("convnet", 10, 1, 8).state_dict()
    weights["head.weight"].fill_(torch.nan)
    torch.save(weights, tmp_path / "weights.pt")

    refused = commands.start("find-lr", "digits", "--model.weights=weights.pt", cwd=tmp_path)

    assert refused.status() == 2
    assert "find-lr: the loss is not finite after 0 steps" in refused.text.splitlines()[-1]


def test_a_diverged_loss_does_not_end_the_search_for_a_batch_size(commands, tmp_path):
    settings = ("--model.optimizer.name=sgd", "--model.optimizer.lr=1e30")
    text = commands.run("find-batch-size", "digits", *settings, cwd=tmp_path).text
    speeds = parse_speeds(text)
    assert len(speeds) >= 3
    assert min(speeds.values()) > 0


def test_the_suggested_batch_size_was_measured(commands, tmp_path):
    text = commands.run("find-batch-size", "digits", "--model.network=convnet", cwd=tmp_path).text
    speeds = parse_speeds(text)
    assert list(speeds)[:3] == [16, 32, 64]

    last_line = text.splitlines()[-1]
    suggested_size = int(re.match(r"--data.batch_size (\d+)  \(", last_line)[1])
    assert speeds[suggested_size] >= 0.95 * max(speeds.values())
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_refused(commands, tmp_path):
    refused = commands.start("find-lr", "digits", f"--ckpt_path={tmp_path / 'none.ckpt'}")
    assert refused.status() == 2
    assert refused.text.strip() == (
        "train: --ckpt_path: find-lr does not take a checkpoint; leave it out (--model.weights "
        "gives weights to start from)"
    )
