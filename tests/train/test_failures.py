"""What goes wrong in a run is one line that says what to try, and a status that is not 0."""
import pytest

QUIET = "--logger", "none", "--progress.quiet", "true", "--audit.enabled", "false"


@pytest.mark.parametrize(("settings", "status", "words"), [
    (("--model.optimizer.name", "sgd", "--model.optimizer.lr", "1e30"), 1,
     "train: the train loss of epoch 1 from step 2 on is not finite: the training diverged; try a lower "
     "--model.optimizer.lr (it is 1e+30)"),
    (("--monitor.port", 70000), 2, "monitor.port: 70000 is not between 1 and 65535"),
    (("--resume.keep", 0), 2, "resume: every_minutes and every_steps must be 0 or more, and keep 1 or more"),
    (("--logger", "tensorbord"), 2, "train: --logger tensorbord: not one of tensorboard, csv, wandb, mlflow, none"),
    (("--trainer.default_root_dir", "/proc/nowhere"), 2, "train: [Errno 2] No such file or directory: '/proc/nowhere"),
    (("--trainer.precision", "16-mixed", "--trainer.accelerator", "gpu"), 2, "train: "),
])
def test_one_line(commands, tmp_path, settings, status, words):
    command = commands.start("run", "digits", *QUIET, *settings, cwd=tmp_path)
    assert command.status() == status
    *told, last = command.text.splitlines()
    assert words in last
    assert all(line.startswith("data: ") for line in told)


@pytest.mark.parametrize(("evaluating", "flag"), [
    (False, "--data.batch_size 647,"), pytest.param(True, "--data.eval_batch_size 72", marks=pytest.mark.slow)])
def test_out_of_memory_names_the_batch_size_to_try(commands, tmp_path, evaluating, flag):
    sizes = ("--data.batch_size", 2, "--data.eval_batch_size", 144) if evaluating else ("--data.batch_size", 1294)
    command = commands.start("run", "digits", *QUIET, *sizes, "--data.size", 256, "--data.cache", tmp_path / "cache",
                             "--model.network", "vgg11", "--trainer.limit_train_batches", 1, cwd=tmp_path,
                             limits={"RLIMIT_AS": 6 << 30})
    assert command.status() == 1
    last = command.text.splitlines()[-1]
    assert last.startswith("train: out of memory on cpu with batches of ")
    assert f"; try {flag}" in last + ","
    assert "Traceback" not in command.text
