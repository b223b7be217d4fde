"""Load weights from disk into a network: a bundle's, timm's, or any state dict."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.networks.base import Network

NESTED_STATES = ("state_dict", "model")
"""Keys of the state dict in files that hold more: of Lightning's checkpoints and of others."""

WRAPPER_PREFIXES = ("module.", "_orig_mod.", "network.")
"""Of the names of tensors: by DistributedDataParallel, torch.compile and Imago's checkpoints."""

HEAD = ("head.weight", "head.bias")
COUNTER = "num_batches_tracked"
"""Of batch norms. It changes no prediction, and old files lack it."""


@dataclass(frozen=True)
class WeightsFile:
    """The contents of a file of weights."""

    path: Path
    tensors: dict[str, Tensor]  # by name, without the prefixes of wrappers
    normalization: tuple[list[float], list[float]] | None = None
    """Mean and standard deviation of each channel, 0..255, that the weights were trained with.

    Bundles and Imago's checkpoints have them, and the classes.
    """
    classes: list[str] | None = None  # of the rows of the head
    network: str | None = None  # its name

    @cached_property
    def digest(self) -> str:
        """The sha256 of the file, in hex."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(
    network: Network, weights: WeightsFile, classes: Sequence[str] | None = None
) -> list[str]:
    """Copy weights into the network that they were trained in.

    Every tensor must match by name and shape, and none may be left over, except for two layers: the
    first convolution, which depends on the size and the channels of the images, and the head, which
    depends on the classes. A first convolution of three channels is summed for a network with one.
    Where the file records its classes, each of `classes` gets the row of the same class.

    Returns names of what keeps its values. Raises ValueError for weights of another network.
    """
    weights = replace(weights, tensors=network.convert_weights(weights.tensors))
    state = network.state_dict()
    stem = _first_kernels(network)
    copied: dict[str, Tensor] = {}
    unchanged: list[str] = []
    problems: list[str] = []

    for name, current in state.items():
        if name in HEAD:
            continue
        value = weights.tensors.get(name)
        if value is not None and name == stem and _is_rgb_to_gray(value, current):
            # What it gives for a gray image is what the three gave for the same image in RGB.
            value = value.sum(1, keepdim=True)
        if value is not None and value.shape == current.shape:
            copied[name] = value
        elif name == stem:
            unchanged.append(name)
        elif value is not None:
            problems.append(f"{name} is {list(value.shape)} there and {list(current.shape)} here")
        elif not name.endswith(COUNTER):
            problems.append(f"it has no {name}")

    problems += [f"{name} has no place here" for name in _unused_names(network, weights.tensors)]
    if problems:
        raise ValueError(_describe_mismatch(weights, problems))

    head, unchanged_head = _match_head(state, weights, classes)
    network.load_state_dict(copied | head, strict=False)
    return unchanged + unchanged_head


def _first_kernels(network: Network) -> str | None:
    """Return the name of the kernels of the first convolution."""
    for path, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            return f"{path}.weight"
    return None


def _is_rgb_to_gray(value: Tensor, current: Tensor) -> bool:
    if value.ndim != 4 or current.ndim != 4:
        return False
    return value.shape[1] == 3 and current.shape[1] == 1


def _unused_names(network: Network, tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of tensors that belong to no layer of the network."""
    known = network.state_dict().keys() | set(HEAD)
    return [name for name in tensors if name not in known and not name.endswith(COUNTER)]


def _describe_mismatch(weights: WeightsFile, problems: list[str]) -> str:
    recorded = f" ({weights.network})" if weights.network else ""
    more = f", and {len(problems) - 1} more tensors differ" if len(problems) > 1 else ""
    return (
        f"{weights.path}: weights of another network{recorded}, or of another size: "
        f"{problems[0]}{more}; give the network, options and size that they were trained with"
    )


def _match_head(
    state: dict[str, Tensor], weights: WeightsFile, classes: Sequence[str] | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of the head for these classes, and names of what keeps its values."""
    names = [name for name in HEAD if name in state]
    is_same_layer = all(
        name in weights.tensors and weights.tensors[name].shape[1:] == state[name].shape[1:]
        for name in names
    )
    if not is_same_layer:
        return {}, names

    rows_there = len(weights.tensors[names[0]])
    if classes is None or weights.classes is None or len(weights.classes) != rows_there:
        is_same_count = rows_there == len(state[names[0]])
        head = {name: weights.tensors[name] for name in names} if is_same_count else {}
        return head, [] if is_same_count else names

    row_of_class = {label: row for row, label in enumerate(weights.classes)}
    shared = [i for i, label in enumerate(classes) if label in row_of_class]
    if not shared:
        return {}, names
    rows = [row_of_class[classes[i]] for i in shared]
    head = {name: state[name].clone() for name in names}
    for name in names:
        head[name][shared] = weights.tensors[name][rows].to(head[name].dtype)

    new_classes = [label for label in classes if label not in row_of_class]
    unchanged = [f"the rows of the head for {', '.join(new_classes)}"] if new_classes else []
    return head, unchanged


def read_weights(path: str | Path) -> WeightsFile:
    """Read a file of weights.

    Raises ValueError for a missing file, and for one that is neither safetensors nor a torch file
    of tensors only.
    """
    path = Path(path)
    state, metadata = _read_file(path)
    for key in NESTED_STATES:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            metadata = {"classes": state.get("classes")}
            state = state[key]
    is_state_dict = isinstance(state, dict) and all(
        isinstance(value, Tensor) for value in state.values()
    )
    if not is_state_dict:
        raise ValueError(
            f"{path}: holds no state dict; save one with torch.save(network.state_dict(), PATH)"
        )

    tensors: dict[str, Tensor] = state
    for prefix in WRAPPER_PREFIXES:
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}

    # Imago's checkpoints have them among the tensors.
    mean = tensors.pop("mean", None)
    std = tensors.pop("std", None)
    if mean is not None and std is not None:
        metadata |= {"mean": mean.flatten().tolist(), "std": std.flatten().tolist()}
    has_normalization = "mean" in metadata and "std" in metadata
    classes = metadata.get("classes")
    return WeightsFile(
        path=path,
        tensors=tensors,
        normalization=(metadata["mean"], metadata["std"]) if has_normalization else None,
        classes=classes if isinstance(classes, list) else None,
        network=metadata.get("network"),
    )


def _read_file(path: Path) -> tuple[Any, dict[str, Any]]:
    """Return the content of a file, and what a bundle's weights record beside the tensors."""
    try:
        if path.suffix != ".safetensors":
            return torch.load(path, map_location="cpu", weights_only=True), {}
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            recorded = file.metadata() or {}
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
    return tensors, _parse_metadata(recorded)


def _parse_metadata(recorded: dict[str, str]) -> dict[str, Any]:
    """Return the values that a bundle writes as JSON; other programs write other values."""
    metadata: dict[str, Any] = {}
    for key in ("network", "classes", "mean", "std"):
        if key in recorded:
            try:
                metadata[key] = json.loads(recorded[key])
            except ValueError:
                continue
    return metadata
