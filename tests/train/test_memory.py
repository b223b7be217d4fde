"""Where the pixels go, by their size and by what is free."""

import pytest
import torch

from train.data import memory

CPU, OTHER = torch.device("cpu"), torch.device("meta")  # a device with memory of its own


@pytest.mark.parametrize(
    ("asked", "megabytes", "device", "place", "words"),
    [
        ("auto", 400, CPU, "host", "0.4 GB within 50% of 1.0 GB of free memory"),
        ("auto", 600, CPU, "stream", "0.6 GB is more than 50% of 1.0 GB of free memory"),
        ("auto", 90, OTHER, "device", "90.0 MB within 50% of the 0.2 GB free on meta"),
        ("auto", 400, OTHER, "host", "0.4 GB within 50% of 1.0 GB of free memory"),
        ("auto", 600, OTHER, "stream", "0.6 GB is more than"),
        ("memory", 600, CPU, "host", "0.6 GB, as asked"),
        ("memory", 90, OTHER, "device", "free on meta"),
        ("memory", 600, OTHER, "host", "0.6 GB, as asked"),
        ("stream", 1, CPU, "stream", "as asked"),
        ("stream", 1, OTHER, "stream", "as asked"),
    ],
)
def test_the_place_follows_what_is_free_or_what_is_asked(
    monkeypatch, asked, megabytes, device, place, words
):
    monkeypatch.setattr(memory, "available", lambda: 10**9)
    monkeypatch.setattr(memory, "_free", lambda device: 2 * 10**8)
    found, why = memory.choose(asked, megabytes * 10**6, 0.5, device)
    assert found == place
    assert words in why


def test_each_process_of_a_node_has_its_share(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 10**9)
    assert memory.choose("auto", 10**8, 0.5, CPU, holders=5)[0] == "host"
    assert memory.choose("auto", 10**8, 0.5, CPU, holders=6) == (
        "stream",
        "6 times 0.1 GB is more than 50% of 1.0 GB of free memory",
    )


def test_some_memory_is_free():
    assert 10**6 < memory.available() < 10**15
