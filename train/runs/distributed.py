"""Several processes: what torchrun says is what the trainer does, and what one decides holds for all.

python -m train.runs.launch --nproc-per-node 2 -m train run DATA
python -m train.runs.launch --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:PORT -m train run DATA
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
from itertools import chain
from typing import Any, NoReturn

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.distributed import _destroy_dist_connection

from train.runs.preemption import NOTICE, Preempted

PATIENCE = timedelta(days=7)  # an audit or a bundle takes what it takes
CHOSEN = "IMAGO_TRAIN_CHOSEN"  # carries the choice to processes that Lightning starts itself


def follow_launcher(trainer: Namespace) -> None:
    """Set the trainer's devices and nodes to what torchrun started, where they are not set."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if trainer.devices == "auto":
        trainer.devices = local
    if trainer.num_nodes == 1:
        trainer.num_nodes = world // local


def agree(trainer: L.Trainer, choose: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the first process chooses (plain values), in all processes."""
    if trainer.world_size == 1:
        return choose()
    if CHOSEN in os.environ:  # in a process that Lightning started
        return json.loads(os.environ[CHOSEN])
    environment = trainer._accelerator_connector.cluster_environment
    if environment.creates_processes_externally:  # all are here: the trainer meets them later
        trainer.strategy.setup_environment()
        return trainer.strategy.broadcast(choose() if trainer.is_global_zero else {})
    chosen = choose()
    os.environ[CHOSEN] = json.dumps(chosen)
    return chosen


def gather(trainer: L.Trainer, rows: list[Any]) -> list[Any]:
    """The rows (plain values) of all processes, those of the first one first."""
    if trainer.world_size == 1:
        return rows
    found: list[list[Any]] = [[]] * trainer.world_size
    torch.distributed.all_gather_object(found, rows)
    return list(chain.from_iterable(found))


def wait_for(trainer: L.Trainer, work: Callable[[], Any]) -> Any:
    """What the first process makes of something that may take long (plain values), in all processes.

    The others wait without the device, which would lose patience after half an hour, and hear signals meanwhile. They
    end as not finished where the first one goes.
    """
    if not _together():
        return work()
    group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    content = json.dumps(work()).encode() if trainer.is_global_zero else b""
    size = torch.tensor(len(content))
    try:
        _broadcast(size, group)
        letters = torch.frombuffer(bytearray(content or int(size)), dtype=torch.uint8)
        _broadcast(letters, group)
    except RuntimeError as error:
        print(
            f"train: the first process has gone: {str(error).splitlines()[0]}",
            file=sys.stderr,
            flush=True,
        )
        raise Preempted(NOTICE.signum or signal.SIGTERM) from error
    torch.distributed.destroy_process_group(group)
    return json.loads(letters.numpy().tobytes())


def _broadcast(tensor: torch.Tensor, group: torch.distributed.ProcessGroup | None) -> None:
    work = torch.distributed.broadcast(tensor, 0, group, async_op=True)
    while not work.is_completed():
        time.sleep(0.05)
    work.wait()


def leave(command: Callable[[], int]) -> NoReturn:
    """End this process with the status of a command.

    One that fails while others are in the midst of something doesn't wait for them: Lightning would have it take down
    NCCL at its exit, which the others' next collective never lets it do, so that nobody ends for half an hour.
    """
    try:
        status = command()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        if not _together():
            raise
        traceback.print_exc()
        status = 1
    if status and _together():
        atexit.unregister(_destroy_dist_connection)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if _together():  # all are done
        torch.distributed.destroy_process_group()
    sys.exit(status)


def _together() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def own_signals(trainer: L.Trainer) -> None:
    """Keep Lightning's hands off SIGTERM: it would end with status 0, and with several processes its handler
    broadcasts from within a signal and each step waits for a word from the first process."""
    NOTICE.forward = getattr(
        trainer.strategy.launcher, "kill", None
    )  # to processes that Lightning starts
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
