"""`python -m train run|fit|validate|test|predict|audit|find-lr|find-batch-size …`"""

import os

import torch

from models.cpu_quota import available_cores
from train.cli.main import main
from train.runs.distributed import leave

if __name__ == "__main__":
    if "OMP_NUM_THREADS" not in os.environ:  # torch by itself knows of no CPU quota
        torch.set_num_threads(min(torch.get_num_threads(), available_cores()))
    leave(main)
