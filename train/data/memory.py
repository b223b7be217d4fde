"""Where pixels are stored: on the device, in host memory, or on disk and streamed."""

from dataclasses import dataclass
from typing import Literal

import torch

from models.memory_limit import available_memory

Memory = Literal["auto", "memory", "stream"]  # values of the setting data.memory
Storage = Literal["device", "host", "stream"]


@dataclass(frozen=True)
class FreeMemory:
    """Bytes that this process may still allocate."""

    host: int
    device: int  # the same as `host` on devices other than CUDA


def measure_free_memory(device: torch.device) -> FreeMemory:
    """Measure the free memory of the host and of the device."""
    host = available_memory()
    on_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host
    return FreeMemory(host, on_device)


def choose_storage(
    memory: Memory,
    size: int,
    share: float,
    device: torch.device,
    free: FreeMemory,
    copies: int = 1,
) -> tuple[Storage, str]:
    """Decide where `size` bytes of pixels are stored; return the storage and the reason in words.

    Pixels go to the device if they fit into `share` of its free memory, else to the host if
    `copies` of them (one for each process of the node) fit into that share of its memory, else they
    are streamed. The settings "memory" and "stream" leave out the check of the host's memory.
    """
    if memory == "stream":
        return "stream", "as set by data.memory"

    if device.type != "cpu" and size <= share * free.device:
        reason = f"{_format_size(size)} within {share:.0%} of the {_format_size(free.device)} free"
        return "device", f"{reason} on {device}"

    if memory == "memory":
        return "host", f"{_format_size(size)}, as set by data.memory"

    needed = f"{copies} times {_format_size(size)}" if copies > 1 else _format_size(size)
    limit = f"{share:.0%} of {_format_size(free.host)} of free memory"
    if copies * size <= share * free.host:
        return "host", f"{needed} within {limit}"
    return "stream", f"{needed} is more than {limit}"


def _format_size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
