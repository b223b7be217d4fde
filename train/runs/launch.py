"""`python -m train launch --nnodes 2 … -m train run DATA`: torchrun that passes on exit statuses.

It runs in the launcher process of each node, which starts the training processes. torchrun ends
with 1 after every failure. But Kubernetes retries a job by its exit status: never after an invalid
setting (2), always after an interruption (143). So the launcher ends with the status of the first
process that failed. Where it loses the other nodes, it ends with 143, as they report the cause.
"""

import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed import DistNetworkError, DistStoreError, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
)

from train.failures import ExitStatus

LOST_NODES = (RendezvousClosedError, RendezvousConnectionError, DistNetworkError, DistStoreError)


def launch(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments and return the exit status of its processes."""
    # torch 2.13 tells the address of a shared store only to the nodes of the first round. A node
    # that replaces a lost one would wait for the address forever.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:
        run.main(list(arguments))
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        return _shell_status(error.get_first_failure()[1].exitcode)
    except LOST_NODES as error:
        print(f"train: the other nodes are gone or have not started yet: {error}", file=sys.stderr)
        return 128 + signal.SIGTERM
    return ExitStatus.DONE


def _shell_status(exit_code: int) -> int:
    """Return 128 plus the number of the signal that killed a process, or else the status itself."""
    return exit_code if exit_code > 0 else 128 - exit_code
