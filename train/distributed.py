"""Several processes: what torchrun says is what the trainer does, and what one decides holds for all.

    python -m train.launch --nproc-per-node 2 -m train run DATA
    python -m train.launch --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:PORT -m train run DATA
"""
import json
import os
from collections.abc import Callable
from itertools import chain
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace

from train.preemption import NOTICE

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


def part() -> None:
    """The processes need each other no more: one writes the bundle, the others may end."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def own_signals(trainer: L.Trainer) -> None:
    """Keep Lightning's hands off SIGTERM: it would end with status 0, and with several processes its handler
    broadcasts from within a signal and each step waits for a word from the first process."""
    NOTICE.forward = getattr(trainer.strategy.launcher, "kill", None)  # to processes that Lightning starts
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
