"""`python -m train launch --nnodes 2 … -m train run DATA`: torchrun with honest exit statuses.

torchrun itself ends with 1 whatever happened. Kubernetes must tell an invalid setting (2), which
stays invalid, and an interruption (143), after which the job resumes, from a failure. So the
launcher ends with the status of the first process that failed, and with 143 where other nodes have
gone: they report their own reason.
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
    """Return 128 plus the number of the signal that killed a process, or else its own status."""
    return exit_code if exit_code > 0 else 128 - exit_code
