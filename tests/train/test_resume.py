"""A run that is killed and resumed ends like an uninterrupted one. Real processes are killed."""

import contextlib
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from support.forked_commands import ForkedCommands
from support.interrupted_runs import (
    EPOCHS,
    STEPS,
    assert_same_result,
    find_run_directory,
    finish_run,
    load_last_checkpoint,
    start_run,
)
from support.sample_images import write_image_folder
from support.server import wait_until
from train.runs import checkpoints


@pytest.fixture(scope="module")
def undisturbed(commands: ForkedCommands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("undisturbed") / "runs"
    finish_run(commands, runs)
    return runs


def test_seeds_give_identical_results(commands, undisturbed, tmp_path):
    finish_run(commands, tmp_path / "runs")
    assert_same_result(tmp_path / "runs", undisturbed)
    metrics = "csv/metrics.csv"
    assert (find_run_directory(tmp_path / "runs") / metrics).read_text() == (
        find_run_directory(undisturbed) / metrics
    ).read_text()


@pytest.mark.parametrize(
    "kill",
    [
        "epoch:3",
        *(
            pytest.param(moment, marks=pytest.mark.slow)
            for moment in (
                "step:1",
                "step:17",
                f"step:{STEPS}",
                f"step:{EPOCHS * STEPS}",
                "validation:2",
                "validation:3",
                "epoch:1",
                "end:0",
            )
        ),
    ],
)
def test_sigterm_saves_and_the_same_command_resumes(commands, undisturbed, tmp_path, kill):
    runs = tmp_path / "runs"
    assert start_run(commands, runs, kill=f"TERM:{kill}").status() == 143
    finished = finish_run(commands, runs)
    if kill != "epoch:1":  # before the first step nothing is saved
        assert "resuming from step" in finished.text
    assert_same_result(runs, undisturbed)


@pytest.mark.slow
def test_a_run_killed_many_times_ends_like_an_uninterrupted_one(commands, undisturbed, tmp_path):
    runs = tmp_path / "runs"
    for kill in (
        "TERM:step:1",
        "TERM:step:9",
        f"TERM:step:{STEPS}",
        "TERM:epoch:2",
        "KILL:step:19",
        "TERM:validation:2",
        "KILL:validation:3",
        "TERM:end:0",
    ):
        expected = 143 if kill.startswith("TERM") else 137
        assert (
            start_run(commands, runs, "--resume.every_steps=4", kill=kill).status() == expected
        ), kill
    finished = finish_run(commands, runs)
    assert f"resuming from step {EPOCHS * STEPS}" in finished.text
    assert_same_result(runs, undisturbed)
    metrics = "csv/metrics.csv"
    assert (find_run_directory(runs) / metrics).read_text() == (
        find_run_directory(undisturbed) / metrics
    ).read_text()


@pytest.mark.slow
def test_the_history_has_validation_metrics_only_after_a_validation(commands, tmp_path):
    flags = (
        "--trainer.check_val_every_n_epoch=2",
        "--trainer.max_epochs=4",
        "--progress.quiet=false",
    )
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    epoch_lines = [
        line
        for line in finish_run(commands, whole, *flags).text.splitlines()
        if line.startswith("epoch ")
    ]
    assert ["val loss" in line for line in epoch_lines] == [False, True, False, True]
    assert start_run(commands, killed, *flags, kill=f"TERM:step:{2 * STEPS + 3}").status() == 143
    finish_run(commands, killed, *flags)
    rows = load_last_checkpoint(whole)["callbacks"]["History"]["rows"]
    assert ["val/loss" in row for row in rows] == [False, True, False, True]
    assert rows[1]["val/loss"] != rows[3]["val/loss"]
    assert_same_result(killed, whole)


def test_a_damaged_checkpoint_is_skipped(commands, undisturbed, tmp_path):
    runs = tmp_path / "runs"
    assert start_run(commands, runs, "--resume.every_steps=4", kill="KILL:step:10").status() == 137
    last = find_run_directory(runs) / "step-000000008.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    (find_run_directory(runs) / ".step-000000012.ckpt.tmp").write_bytes(b"PK half of a checkpoint")
    finished = finish_run(commands, runs)
    assert f"{last}: damaged, skipped" in finished.text
    assert "resuming from step 4:" in finished.text
    assert_same_result(runs, undisturbed)
    assert not list(find_run_directory(runs).glob(".*.tmp"))


def test_any_flipped_byte_of_a_checkpoint_s_directory_is_detected(tmp_path):
    file = checkpoints.checkpoint_path(tmp_path, 3)
    torch.save({"state_dict": {"w": torch.arange(1000.0)}, "epoch": 2}, file)
    sound = file.read_bytes()
    assert checkpoints.newest_checkpoint(tmp_path) == file
    for offset in range(sound.rindex(b"PK\x01\x02", 0, -200) - 400, len(sound)):
        damaged = bytearray(sound)
        damaged[offset] ^= 0xFF
        file.write_bytes(damaged)
        if checkpoints.newest_checkpoint(tmp_path):  # bytes such as those of a date do not matter
            weights = torch.load(file, weights_only=True)["state_dict"]["w"]
            assert weights.tolist() == list(range(1000))


@pytest.mark.slow
def test_a_full_disk_is_reported_and_costs_no_checkpoint(commands, undisturbed, tmp_path):
    runs = tmp_path / "runs"
    assert start_run(commands, runs, "--resume.every_steps=4", kill="KILL:step:6").status() == 137
    full = start_run(commands, runs, "--resume.every_steps=4", limits={"RLIMIT_FSIZE": 100_000})
    assert full.status() == 1
    assert (
        "can't write the checkpoint of step 8 (File too large); the last one is of step 4"
        in full.text
    )
    assert "Traceback" not in full.text
    assert "resuming from step 4:" in finish_run(commands, runs).text
    assert_same_result(runs, undisturbed)


@pytest.mark.slow
def test_a_finished_run_and_another_job_s_run_are_not_resumed(commands, tmp_path):
    short = "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"
    frozen = start_run(commands, tmp_path, *short, kill="STOP:step:1")
    frozen.wait_for("pixels kept")
    wait_until((tmp_path / "digits/1/settings.json").exists)
    finish_run(commands, tmp_path, *short)  # the first run is another job's: this is a second
    frozen.send_signal(signal.SIGKILL)
    assert frozen.status() == 137
    finish_run(commands, tmp_path, *short)  # the second is finished: this is a third
    assert start_run(commands, tmp_path, *short, kill="TERM:step:1").status() == 143
    finish_run(commands, tmp_path, *short, "--fresh")  # the fourth is unfinished: this is a fifth
    finished = [path.parent.name for path in tmp_path.glob("digits/*/finished")]
    assert sorted(finished) == ["2", "3", "5"]


@pytest.mark.slow
def test_a_changed_setting_starts_a_new_run_unless_it_is_indifferent(
    commands, undisturbed, tmp_path
):
    runs = tmp_path / "runs"
    assert start_run(commands, runs, kill="TERM:step:4").status() == 143
    indifferent = "--data.workers=1", f"--data.cache={tmp_path / 'cache'}"
    assert start_run(commands, runs, *indifferent, kill="TERM:step:9").status() == 143
    fresh = finish_run(
        commands,
        runs,
        "--data.batch_size=200",
        "--model.optimizer.lr=0.03",
        "--trainer.max_epochs=1",
    )
    assert (
        f"train: {runs}/digits/1: unfinished, but started with other settings (data.batch_size, "
        "model.optimizer.lr, trainer.max_epochs); starts a new run"
    ) in fresh.text
    (runs / "digits/2").rename(tmp_path / "2")
    assert "resuming from step 9:" in finish_run(commands, runs).text
    assert_same_result(runs, undisturbed)
    assert "unfinished" not in finish_run(commands, runs, "--trainer.max_epochs=1").text


def test_a_run_is_not_resumed_with_other_data(commands, tmp_path):
    photos = write_image_folder(tmp_path / "photos", 40)
    runs = tmp_path / "runs"
    settings = (
        f"--data.source={photos}",
        "--name=digits",
        "--data.batch_size=16",
        "--trainer.max_epochs=2",
    )
    assert start_run(commands, runs, *settings, kill="TERM:step:3").status() == 143
    (photos / "yellow").mkdir()
    for i in range(9):
        (photos / "yellow" / f"{i}.png").write_bytes((photos / "red" / f"{i:03d}.png").read_bytes())
    refused = start_run(commands, runs, *settings)
    assert refused.status() == 2
    assert refused.text.splitlines()[-1].startswith(
        f"train: {find_run_directory(runs)}: started on other images, labels or classes"
    )
    assert "--fresh" in refused.text.splitlines()[-1]
    shutil.rmtree(photos / "yellow")
    removed = (photos / "red" / "000.png").read_bytes()
    (photos / "red" / "000.png").unlink()
    assert start_run(commands, runs, *settings).status() == 2
    (photos / "red" / "000.png").write_bytes(removed)
    assert "resuming from step 3:" in finish_run(commands, runs, *settings).text


def test_training_continues_from_a_finished_run_s_checkpoint(commands, undisturbed, tmp_path):
    last = find_run_directory(undisturbed) / "last.ckpt"
    finish_run(
        commands, tmp_path / "longer", f"--ckpt_path={last}", f"--trainer.max_epochs={EPOCHS + 2}"
    )
    before = torch.load(last, weights_only=True)
    after = load_last_checkpoint(tmp_path / "longer")
    assert before["global_step"] == EPOCHS * STEPS
    assert after["global_step"] == (EPOCHS + 2) * STEPS
    assert len(after["callbacks"]["History"]["rows"]) == EPOCHS + 2
    name = "network.head.weight"
    assert not torch.equal(before["state_dict"][name], after["state_dict"][name])
    again = finish_run(commands, tmp_path / "again", f"--ckpt_path={last}")
    assert f"{last}: nothing was trained, its {EPOCHS} epochs are done already" in again.text


@pytest.mark.slow
def test_every_random_number_is_restored(commands, tmp_path):
    """A network with dropout and batch norm, and gradients summed over two batches."""
    network = (
        "--model.network=mobilenetv3_small_100",
        "--model.options={drop_rate: 0.2}",
        "--data.size=16",
        "--trainer.limit_train_batches=6",
        "--trainer.max_epochs=2",
        "--trainer.accumulate_grad_batches=2",
    )
    finish_run(commands, tmp_path / "undisturbed", *network)
    assert start_run(commands, tmp_path / "killed", *network, kill="TERM:step:9").status() == 143
    assert "resuming from step 5:" in finish_run(commands, tmp_path / "killed", *network).text
    assert_same_result(tmp_path / "killed", tmp_path / "undisturbed")


def test_sampling_and_augmentation_draw_the_same_again(commands, tmp_path):
    """With balanced sampling, and each augmentation that is random."""
    chances = {
        "brightness": 0.3,
        "contrast": 0.3,
        "random_resized_crop": 0.5,
        "erasing": 0.5,
        "mixup": 0.4,
        "cutmix": 0.5,
        "flip": "random",
    }
    drawn = ["--data.sampling=balanced", "--trainer.max_epochs=2"]
    for name, value in chances.items():
        drawn.append(f"--data.augment.{name}={value}")
    finish_run(commands, tmp_path / "undisturbed", *drawn)
    assert (
        start_run(commands, tmp_path / "killed", *drawn, kill=f"TERM:step:{STEPS + 6}").status()
        == 143
    )
    assert (
        f"resuming from step {STEPS + 6}:" in finish_run(commands, tmp_path / "killed", *drawn).text
    )
    assert_same_result(tmp_path / "killed", tmp_path / "undisturbed")


@pytest.mark.slow
def test_accumulated_gradients_are_not_lost(commands, tmp_path):
    """The validation starts after three of six batches, when the third is half of a step."""
    halves = (
        "--trainer.limit_train_batches=6",
        "--trainer.max_epochs=1",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.val_check_interval=3",
    )
    finish_run(commands, tmp_path / "undisturbed", *halves)
    assert (
        start_run(commands, tmp_path / "killed", *halves, kill="TERM:validation:1").status() == 143
    )
    assert "resuming from step 2:" in finish_run(commands, tmp_path / "killed", *halves).text
    assert_same_result(tmp_path / "killed", tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_stream_resumes_where_it_stopped(commands, tmp_path):
    """Dropout shows whether random numbers differ. The second signal also reaches the workers."""
    stream = (
        "--data.memory=stream",
        "--data.workers=2",
        "--model.network=mobilenetv3_small_100",
        "--model.options={drop_rate: 0.2}",
        "--trainer.limit_train_batches=9",
        "--trainer.max_epochs=2",
    )
    finish_run(commands, tmp_path / "undisturbed", *stream)
    assert start_run(commands, tmp_path / "killed", *stream, kill="TERM:step:3").status() == 143
    assert start_run(commands, tmp_path / "killed", *stream, kill="GROUP:step:11").status() == 143
    assert "resuming from step 11:" in finish_run(commands, tmp_path / "killed", *stream).text
    assert_same_result(tmp_path / "killed", tmp_path / "undisturbed")


@pytest.mark.slow
def test_sigkill_at_any_moment(commands, undisturbed, tmp_path):
    runs = tmp_path / "runs"
    moment = 1.0
    while True:
        command = start_run(commands, runs, "--resume.every_steps=1")
        time.sleep(moment)  # the moment itself is what the test varies
        with contextlib.suppress(ProcessLookupError):  # it ended first
            command.send_signal(signal.SIGKILL)
        if command.status() == 0:
            break
        moment += 0.137
    assert_same_result(runs, undisturbed)


def test_a_step_that_does_not_end_is_aborted_and_the_one_before_is_kept(
    commands, undisturbed, tmp_path
):
    """No checkpoint is due for minutes, but steps are slow, so each of them is kept in memory."""
    command = start_run(commands, tmp_path, "--resume.notice_seconds=1.2", kill="SLEEP:step:5")
    command.wait_for("asleep")
    command.send_signal(signal.SIGTERM)
    assert command.status() == 143
    assert "did not end within 1.2 s of the signal; the next start resumes from step 4" in (
        command.text
    )
    assert "resuming from step 4:" in finish_run(commands, tmp_path).text
    assert_same_result(tmp_path, undisturbed)


def test_a_slow_step_after_fast_ones_costs_the_last_steps_only(commands, undisturbed, tmp_path):
    """No checkpoint is due for minutes. The state is copied to memory every 0.4 seconds."""
    command = start_run(commands, tmp_path, "--resume.notice_seconds=1.2", kill="STALL:step:9")
    command.wait_for("asleep")
    command.send_signal(signal.SIGTERM)
    assert command.status() == 143
    match = re.search(r"did not end .*; the next start resumes from step (\d)$", command.text, re.M)
    assert match is not None, command.text
    assert 1 <= int(match[1]) <= 8
    assert f"resuming from step {match[1]}:" in finish_run(commands, tmp_path).text
    assert_same_result(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_run_killed_while_it_writes_its_bundle_writes_it_when_resumed(commands, tmp_path):
    more = "--export.enabled=true", f"--store={tmp_path / 'store'}"
    assert start_run(commands, tmp_path, *more, kill="TERM:export:5").status() == 143
    assert not list((tmp_path / "store").glob("digits/[0-9]*"))
    finished = finish_run(commands, tmp_path, *more)
    assert f"resuming from step {EPOCHS * STEPS}:" in finished.text
    assert [p.name for p in (tmp_path / "store/digits").iterdir() if p.name[0].isdigit()] == ["1"]
