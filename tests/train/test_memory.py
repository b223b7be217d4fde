"""Where pixels are stored, by their size and the free memory."""

import pytest
import torch

from models.memory_limit import available_memory
from train.data.memory import FreeMemory, choose_storage

CPU = torch.device("cpu")
ACCELERATOR = torch.device("meta")  # a device with memory of its own
FREE = FreeMemory(host=10**9, device=2 * 10**8)


@pytest.mark.parametrize(
    ("setting", "megabytes", "device", "storage", "reason"),
    [
        ("auto", 400, CPU, "host", "0.4 GB within 50% of 1.0 GB of free memory"),
        ("auto", 600, CPU, "stream", "0.6 GB is more than 50% of 1.0 GB of free memory"),
        ("auto", 90, ACCELERATOR, "device", "90.0 MB within 50% of the 0.2 GB free on meta"),
        ("auto", 400, ACCELERATOR, "host", "0.4 GB within 50% of 1.0 GB of free memory"),
        ("auto", 600, ACCELERATOR, "stream", "0.6 GB is more than"),
        ("memory", 600, CPU, "host", "0.6 GB, as set by data.memory"),
        ("memory", 90, ACCELERATOR, "device", "free on meta"),
        ("memory", 600, ACCELERATOR, "host", "0.6 GB, as set by data.memory"),
        ("stream", 1, CPU, "stream", "as set by data.memory"),
        ("stream", 1, ACCELERATOR, "stream", "as set by data.memory"),
    ],
)
def test_storage_follows_the_free_memory_and_the_setting(
    setting, megabytes, device, storage, reason
):
    chosen, words = choose_storage(setting, megabytes * 10**6, 0.5, device, FREE)
    assert chosen == storage
    assert reason in words


def test_each_process_of_a_node_needs_its_share_of_host_memory():
    storage, _ = choose_storage("auto", 10**8, 0.5, CPU, FREE, copies=5)
    assert storage == "host"

    storage, reason = choose_storage("auto", 10**8, 0.5, CPU, FREE, copies=6)
    assert storage == "stream"
    assert reason == "6 times 0.1 GB is more than 50% of 1.0 GB of free memory"


def test_the_available_memory_is_plausible():
    assert 10**6 < available_memory() < 10**15
