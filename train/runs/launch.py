"""torchrun that ends as its processes did: `python -m train.runs.launch --nnodes 2 … -m train run DATA`.

torchrun itself ends with 1 whatever happened. Kubernetes has to tell a wrong setting (2), which stays wrong, and "not
finished" (143), which goes on later, from what failed. So here a process's own status comes through, and 143 stands
for other nodes that have gone too: why they went, they say themselves.
"""

import os
import signal
import sys

from torch.distributed import DistNetworkError, DistStoreError, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
)

GONE = (RendezvousClosedError, RendezvousConnectionError, DistNetworkError, DistStoreError)


def main() -> int:
    # torch 2.13 tells the address of a store that it keeps to those of the first round alone: a node that takes the
    # place of one that was lost waits for it in vain.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:
        run.main()
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        return status if status > 0 else 128 - status  # below 0: the signal that killed it
    except GONE as error:
        print(f"train: the other nodes have gone, or are not there yet: {error}", file=sys.stderr)
        return 128 + signal.SIGTERM
    return 0


if __name__ == "__main__":
    sys.exit(main())
