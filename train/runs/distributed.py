"""Training in several processes: torchrun's settings, and work that one process does for all.

A launcher starts the processes, or Lightning does:

python -m train launch --nproc-per-node 2 -m train run DATA
python -m train launch --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:PORT \
    -m train run DATA
python -m train run DATA --trainer.devices 2
"""

import atexit
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import lightning as L
import torch
from jsonargparse import Namespace

from train.failures import ExitStatus
from train.learning.lightning_loop_state import LightningLoopState, keep_process_group_at_exit
from train.runs.preemption import NOTICE, Preempted

WORK_TIMEOUT = timedelta(days=7)  # an audit or a bundle may take hours
POLL_SECONDS = 0.05


def follow_launcher(trainer_settings: Namespace) -> None:
    """Set the number of devices and nodes to what torchrun has started, where they are not set."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    processes_on_node = int(os.environ["LOCAL_WORLD_SIZE"])
    processes = int(os.environ["WORLD_SIZE"])
    if trainer_settings.devices == "auto":
        trainer_settings.devices = processes_on_node
    if trainer_settings.num_nodes == 1:
        trainer_settings.num_nodes = processes // processes_on_node


def connect_processes(trainer: L.Trainer) -> None:
    """Start the other processes, where no launcher has done so, and join the process group.

    Lightning would do both in `fit`. But the processes share a run directory, the data and the
    audit, and all of these come before.
    """
    if trainer.world_size == 1:
        return
    loop_state = LightningLoopState(trainer)
    if loop_state.start_processes():
        loop_state.connect_processes()


def share_choice(trainer: L.Trainer, choose: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what the first process chooses (plain values), in all processes.

    Call it after `connect_processes`.
    """
    if not is_connected():
        return choose()
    return trainer.strategy.broadcast(choose() if trainer.is_global_zero else {})


def gather_rows(trainer: L.Trainer, rows: list[Any]) -> list[Any]:
    """Return the rows (plain values) of all processes, in the order of the processes."""
    if trainer.world_size == 1:
        return rows
    rows_by_process: list[list[Any]] = [[]] * trainer.world_size
    torch.distributed.all_gather_object(rows_by_process, rows)
    all_rows: list[Any] = []
    for process_rows in rows_by_process:
        all_rows += process_rows
    return all_rows


def run_once_per_node(trainer: L.Trainer, work: Callable[[], None]) -> None:
    """Run `work` in the first process of each node; the others continue when it is done."""
    if trainer.local_rank == 0:
        work()
    if is_connected():
        group = torch.distributed.new_group(backend="gloo", timeout=WORK_TIMEOUT)
        try:
            _wait(torch.distributed.all_reduce(torch.zeros(1), group=group, async_op=True))
        except RuntimeError as error:
            _exit_without_first_process(error)
        torch.distributed.destroy_process_group(group)


def run_in_first_process(trainer: L.Trainer, work: Callable[[], Any]) -> Any:
    """Run `work` in the first process and return its result (plain values) in all processes.

    The work may take hours. The others wait on the CPU, as a wait on the GPU times out after half
    an hour, and handle signals meanwhile. If the first process ends, they end as interrupted.
    Processes that are not connected return None unless they are the first.
    """
    if not is_connected():
        return work() if trainer.is_global_zero else None

    group = torch.distributed.new_group(backend="gloo", timeout=WORK_TIMEOUT)
    content = json.dumps(work()).encode() if trainer.is_global_zero else b""
    size = torch.tensor(len(content))
    try:
        _broadcast(size, group)
        content_bytes = torch.frombuffer(bytearray(content or int(size)), dtype=torch.uint8)
        _broadcast(content_bytes, group)
    except RuntimeError as error:
        _exit_without_first_process(error)
    torch.distributed.destroy_process_group(group)
    return json.loads(content_bytes.numpy().tobytes())


def _broadcast(tensor: torch.Tensor, group: torch.distributed.ProcessGroup) -> None:
    """Fill the tensor of each process with that of the first process."""
    _wait(torch.distributed.broadcast(tensor, 0, group, async_op=True))


def _wait(work: torch.distributed.Work) -> None:
    """Wait for a collective operation, and let Python handle signals meanwhile."""
    while not work.is_completed():
        time.sleep(POLL_SECONDS)
    work.wait()


def _exit_without_first_process(error: RuntimeError) -> NoReturn:
    """Print that the first process is lost, and end this one as interrupted."""
    reason = str(error).splitlines()[0]
    print(f"train: lost the connection to the first process: {reason}", file=sys.stderr, flush=True)
    raise Preempted(NOTICE.signum or signal.SIGTERM) from error


def run_process(command: Callable[[], int]) -> int:
    """Run a command and return the exit status for this process.

    A process that fails while it is connected to others exits at once and does not return.
    Otherwise Lightning would shut down NCCL at its exit, which waits for the next collective
    operation of the others, and no process would end for half an hour.
    """
    try:
        status = command()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        if not is_connected():
            raise
        traceback.print_exc()
        status = ExitStatus.FAILED

    if not is_connected():
        return status
    if status != ExitStatus.DONE:
        _exit_at_once(status)
    torch.distributed.destroy_process_group()
    return status


def _exit_at_once(status: int) -> NoReturn:
    """End this process, with its exit handlers, but without the destructors of libraries."""
    keep_process_group_at_exit()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def is_connected() -> bool:
    """Whether this process is a member of a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def take_over_signals(trainer: L.Trainer) -> None:
    """Let preemption.py handle SIGTERM instead of Lightning, and forward it to other processes."""
    loop_state = LightningLoopState(trainer)
    NOTICE.forward_with(loop_state.signal_sender())
    loop_state.disable_signal_handling()
