"""`python -m train COMMAND …` and `imago train COMMAND …`; `--help` lists the commands.

Each process of a run starts here, and so does the launcher that starts several of them.
"""

import os
import sys
from collections.abc import Sequence

import torch

from models.cpu_quota import available_cores


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command of the command line and return the exit status of the process."""
    words = list(sys.argv[1:] if arguments is None else arguments)

    # Dispatched before the imports below, which take seconds that a launcher does not need.
    if words[:1] == ["launch"]:
        from train.runs.launch import launch

        return launch(words[1:])

    from train.cli.main import main as run_command
    from train.runs.distributed import run_process

    if "OMP_NUM_THREADS" not in os.environ:
        # torch does not know the CPU quota of a container.
        torch.set_num_threads(min(torch.get_num_threads(), available_cores()))
    return run_process(lambda: run_command(words))


if __name__ == "__main__":
    sys.exit(main())
