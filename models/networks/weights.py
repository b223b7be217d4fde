"""Load weights from disk into a network: a bundle's, torchvision's, or any state dict."""

import json
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from models.networks.base import Network
from models.networks.torchvision_network import list_torchvision_models, sum_rgb_kernels

IMAGENET = "imagenet"

WRAPPER_PREFIXES = ("module.", "_orig_mod.", "network.")
"""Of the names of tensors: by DistributedDataParallel, torch.compile and Imago's checkpoints."""


def find_weights_file(weights: str, network: str) -> Path:
    """Return the file of weights: a path, or with "imagenet" torchvision's best ones.

    torchvision's are downloaded once. Raises ValueError where there are none for the network, or
    the download fails.
    """
    if weights != IMAGENET:
        return Path(weights)
    if network not in list_torchvision_models():
        raise ValueError(
            f"weights imagenet: torchvision has none for {network!r}; "
            "choose a network of torchvision"
        )

    url = torchvision.models.get_model_weights(network).DEFAULT.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if file.exists():
        return file

    file.parent.mkdir(parents=True, exist_ok=True)
    sha256_prefix = file.stem.rpartition("-")[2]  # torchvision names files by their checksum
    try:
        torch.hub.download_url_to_file(url, str(file), sha256_prefix, progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError: another checksum
        raise ValueError(
            f"weights imagenet: can't download {url} ({error}); fetch it on another machine and "
            "give the path of the file instead of imagenet"
        ) from error
    return file


def load_weights(network: Network, path: str | Path) -> list[str]:
    """Copy the matching tensors of a .safetensors file or a torch state dict into a network.

    Returns the names of the tensors that keep their values, because the file has none of that name
    and shape: the head for another number of classes, the stem for another size. A first
    convolution of three channels is summed for a network with one. Raises ValueError where the file
    can't be read, or most of the network does not match.
    """
    weights = read_weights(Path(path))
    state = network.state_dict()
    matching: dict[str, Tensor] = {}
    unchanged: list[str] = []

    for name, current in state.items():
        value = weights.get(name)
        if value is None:
            value = weights.get(name.removeprefix("model."))
        if value is not None and _is_rgb_to_gray(value, current):
            value = sum_rgb_kernels(value)
        if value is None or value.shape != current.shape:
            unchanged.append(name)
        else:
            matching[name] = value

    matching_numbers = sum(value.numel() for value in matching.values())
    all_numbers = sum(value.numel() for value in state.values())
    if 2 * matching_numbers < all_numbers:
        raise ValueError(
            f"{path}: weights of another network: only {len(matching)} of {len(state)} tensors "
            "match; give the network and options that the weights were saved from"
        )
    network.load_state_dict(matching, strict=False)
    return unchanged


def _is_rgb_to_gray(value: Tensor, current: Tensor) -> bool:
    if value.ndim != 4 or current.ndim != 4:
        return False
    return value.shape[1] == 3 and current.shape[1] == 1


def read_normalization(path: Path) -> tuple[list[float], list[float]] | None:
    """Return mean and standard deviation of each channel, 0..255, that weights were trained with.

    The weights of bundles and Imago's checkpoints have them; for others returns None. Call it after
    `load_weights`, which raises for a file that can't be read.
    """
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        if "mean" not in metadata or "std" not in metadata:
            return None
        return json.loads(metadata["mean"]), json.loads(metadata["std"])

    state = read_weights(path)
    if "mean" not in state or "std" not in state:
        return None
    return state["mean"].flatten().tolist(), state["std"].flatten().tolist()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read names and tensors from a file, without the prefixes of wrappers.

    Raises ValueError for a missing file, and for one that is neither safetensors nor a torch file
    of tensors only.
    """
    state = _read_file(path)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]  # a Lightning checkpoint
    is_state_dict = isinstance(state, dict) and all(
        isinstance(value, Tensor) for value in state.values()
    )
    if not is_state_dict:
        raise ValueError(
            f"{path}: holds no state dict; save one with torch.save(network.state_dict(), PATH)"
        )

    weights: dict[str, Tensor] = state
    for prefix in WRAPPER_PREFIXES:
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _read_file(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(
            f"{path}: no such file; give a .safetensors file or a torch state dict"
        ) from error
    except Exception as error:  # torch passes on the errors of its zip and pickle readers
        kind = "a safetensors file"
        if not isinstance(error, SafetensorError):
            kind = "a file of weights only"
        cause = str(error).splitlines()[0][:120]
        raise ValueError(f"{path}: not {kind} ({cause})") from error
