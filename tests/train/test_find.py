"""The learning-rate finder and the batch-size finder, from the command line."""

import re


def test_the_suggested_learning_rate_lies_where_the_loss_falls(commands, tmp_path):
    lines = commands.run("find-lr", "digits", "--logger", "none", cwd=tmp_path).text.splitlines()
    table = [line.split() for line in lines if re.fullmatch(r"\s+[\d.e+-]+\s+[\d.]+", line)]
    rows = [(float(rate), float(loss)) for rate, loss in table]
    assert rows[0][0] < 1e-5
    assert len(rows) >= 10
    least = min(loss for _, loss in rows)
    assert least < 1.5 < rows[0][1]
    rate = float(re.match(r"--model.optimizer.lr (\S+)  \(", lines[-1])[1])
    assert rows[0][0] < rate < next(r for r, loss in rows if loss == least)
    assert not list(tmp_path.iterdir())  # a trial leaves nothing behind


def test_a_diverged_loss_does_not_end_the_search_for_a_batch_size(commands, tmp_path):
    lines = commands.run(
        "find-batch-size",
        "digits",
        "--model.optimizer.name",
        "sgd",
        "--model.optimizer.lr",
        "1e30",
        cwd=tmp_path,
    ).text.splitlines()
    speeds = [float(line.split()[1].replace(",", "")) for line in lines if line.endswith("-")]
    assert len(speeds) >= 3
    assert min(speeds) > 0


def test_the_suggested_batch_size_was_measured(commands, tmp_path):
    lines = commands.run(
        "find-batch-size", "digits", "--model.network", "convnet", cwd=tmp_path
    ).text.splitlines()
    speeds = {
        int(a): float(b.replace(",", ""))
        for a, b, _ in (line.split() for line in lines if line.endswith("-"))
    }
    assert list(speeds)[:3] == [16, 32, 64]
    best = int(re.match(r"--data.batch_size (\d+)  \(", lines[-1])[1])
    assert speeds[best] >= 0.95 * max(speeds.values())
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_refused(commands, tmp_path):
    refused = commands.start("find-lr", "digits", "--ckpt_path", tmp_path / "none.ckpt")
    assert refused.status() == 2
    assert refused.text.strip() == (
        "train: --ckpt_path: find-lr does not take a checkpoint; leave it out (--model.weights "
        "gives weights to start from)"
    )
