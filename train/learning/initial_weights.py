"""The weights that training starts from: `model.weights`."""

from functools import cached_property
from pathlib import Path

from models.bundle import MANIFEST_FILE
from models.bundle.manifest import read_manifest
from models.networks.pretrained import (
    Preprocessing,
    fetch_pretrained_file,
    pretrained_preprocessing,
)
from models.networks.weights import WeightsFile, read_weights
from models.store import LATEST, Store

RANDOM = "none"
PRETRAINED = "pretrained"
BUNDLE_WEIGHTS = "weights.safetensors"
FILE_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
DEFAULT_STORE = "artifacts/store"


class InitialWeights:
    """The weights that a setting names: pretrained, a bundle's, a file's, or none.

    A bundle is given by its directory, by the weights in it, or as `name` or `name/version` of the
    store, also after the URL of another one: `s3://bucket/store/name/version`. Nothing is read or
    downloaded before it is needed.
    """

    def __init__(self, setting: str | None, network: str, store: str = DEFAULT_STORE):
        if setting == "imagenet":
            raise ValueError("model.weights: there is no imagenet; give pretrained instead")
        self.setting = "" if setting in (None, RANDOM) else str(setting)
        self.network = network
        self.store = store

    def __bool__(self) -> bool:
        """Whether there are any; without, the network starts with random weights."""
        return bool(self.setting)

    @cached_property
    def bundle(self) -> Path | None:
        """Directory of the bundle; None where the setting names none.

        One of a bucket is copied to this machine. Raises BundleError where the store has no such
        version.
        """
        if self.setting in ("", PRETRAINED):
            return None
        path = Path(self.setting).expanduser()
        if path.is_file():
            is_of_bundle = path.name == BUNDLE_WEIGHTS
            return path.parent if is_of_bundle and _is_bundle(path.parent) else None
        if _is_bundle(path):
            return path
        if path.suffix in FILE_ENDINGS or path.is_absolute():
            return None  # a file that does not exist
        store, name, version = _split_location(self.setting, self.store)
        return Store(store).path(name, version)

    @cached_property
    def file(self) -> Path:
        """The file of the weights, which is downloaded where needed.

        Raises ValueError where they can't be had.
        """
        if self.setting == PRETRAINED:
            return fetch_pretrained_file(self.network)
        if self.bundle is not None:
            return self.bundle / BUNDLE_WEIGHTS
        return Path(self.setting).expanduser()

    def read(self) -> WeightsFile:
        """Read the file of the weights. Raises ValueError where it can't be had or read."""
        return read_weights(self.file)

    def preprocessing(self) -> Preprocessing | None:
        """Return how the images were prepared that the weights were trained on, where known.

        Pretrained weights are not downloaded for it.
        """
        if self.setting == PRETRAINED:
            return pretrained_preprocessing(self.network)
        if self.bundle is None:
            return None

        spec = read_manifest(self.bundle).input
        normalization = self.read().normalization
        if normalization is None:
            return None
        mean, std = normalization
        return Preprocessing(
            size=spec.height,
            resize=spec.resize,
            short_side=spec.short_side,
            interpolation=spec.interpolation,
            mean=tuple(mean),
            std=tuple(std),
            channels=spec.channels,
        )


def _split_location(setting: str, store: str) -> tuple[str, str, str]:
    """Return store, name and version of `name`, `name/version`, or either of them after a URL."""
    if "://" not in setting:
        name, _, version = setting.partition("/")
        return store, name, version or LATEST
    location, _, last = setting.rstrip("/").rpartition("/")
    if last != LATEST and not last.isdecimal():
        return location, last, LATEST
    store, _, name = location.rpartition("/")
    return store, name, last


def _is_bundle(directory: Path) -> bool:
    return (directory / MANIFEST_FILE).is_file()
