"""Weights from disk into a network: of an earlier bundle, of torchvision, or another state dict that fits."""

import json
from pathlib import Path

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from models.networks import zoo
from models.networks.base import Network

IMAGENET = "imagenet"


def find_weights_file(weights: str, network: str) -> Path:
    """The file of weights: a path, or for "imagenet" torchvision's best ones for the network, downloaded once.

    Raises ValueError, with the way out, where there are none or they can't be downloaded.
    """
    if weights != IMAGENET:
        return Path(weights)
    if network not in zoo.names():
        raise ValueError(
            f"weights imagenet: torchvision has none for {network!r}; choose a network of torchvision"
        )
    url = torchvision.models.get_model_weights(network).DEFAULT.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            prefix = file.stem.rpartition("-")[2]  # torchvision's files are named by their digest
            torch.hub.download_url_to_file(url, str(file), prefix, progress=False)
        except OSError as error:
            raise ValueError(
                f"weights imagenet: can't download {url} ({error}); fetch it where there is a network and "
                "give the file in place of «imagenet»"
            ) from error
    return file


def load_weights(network: Network, path: str | Path) -> list[str]:
    """Copy what fits from a .safetensors file or a torch state dict; give back the names that keep their first values.

    A first convolution of three channels is summed for one. A head of another number of classes stays as it is, and so
    does a stem of another size. Raises ValueError where the file is no such thing or is of another network.
    """
    found = read_weights(Path(path))
    state = network.state_dict()
    kept, fitted = [], {}
    for name, old in state.items():
        new = found.get(name, found.get(name.removeprefix("model.")))
        if (
            new is not None
            and new.ndim == 4
            and old.ndim == 4
            and new.shape[1] == 3
            and old.shape[1] == 1
        ):
            new = zoo.sum_rgb(new)
        if new is None or new.shape != old.shape:
            kept.append(name)
        else:
            fitted[name] = new
    if 2 * sum(v.numel() for v in fitted.values()) < sum(v.numel() for v in state.values()):
        raise ValueError(
            f"{path}: weights of another network: of {len(state)} tensors only {len(fitted)} fit; "
            "give the same network (and options) that wrote it"
        )
    network.load_state_dict(fitted, strict=False)
    return kept


def read_normalization(path: Path) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of each channel, in 0..255, that a bundle's weights or a checkpoint of ours were
    trained with; None for other files. The file must be one that `read_weights` takes."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
        return (
            (json.loads(found["mean"]), json.loads(found["std"]))
            if {"mean", "std"} <= found.keys()
            else None
        )
    state = read_weights(path)
    if not {"mean", "std"} <= state.keys():
        return None
    return state["mean"].flatten().tolist(), state["std"].flatten().tolist()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Names to tensors, without the prefixes that wrappers put before them. Raises ValueError."""
    try:
        if path.suffix == ".safetensors":
            state: object = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(
            f"{path}: no such file; give weights on disk (a .safetensors file or a torch state dict)"
        ) from error
    except Exception as error:  # torch raises whatever the zip or pickle reader raised
        kind = (
            "a safetensors file" if isinstance(error, SafetensorError) else "a file of weights only"
        )
        raise ValueError(f"{path}: not {kind} ({str(error).splitlines()[0][:120]})") from error
    if isinstance(state, dict) and isinstance(
        state.get("state_dict"), dict
    ):  # a Lightning checkpoint
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"{path}: holds no state dict; save one with torch.save(network.state_dict(), PATH)"
        )
    for prefix in ("module.", "_orig_mod.", "network."):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
