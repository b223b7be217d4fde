"""timm's image models by name, with a new head of one linear layer.

They also take one channel and small images.
"""

import warnings
from functools import cache
from typing import Any, Literal, get_args

import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models.networks.base import Network

SMALL_SIZE = 64
"""Pixels up to which a stem that shrinks the image at once would lose its details."""

STEM_POOLS = ("maxpool", "stem.pool", "features.pool0")
"""Paths of the max-pool after the first convolution: in ResNet, ResNetV2 and DenseNet."""

RESERVED_OPTIONS = ("pretrained", "num_classes", "in_chans", "features_only", "checkpoint_path")
"""Arguments of timm.create_model that other settings decide."""

CHANNELS_FIRST = (2, 3)
CHANNELS_LAST = (1, 2)
"""Axes of height and width in features [N,D,h,w] and [N,h,w,D]."""

Stem = Literal["auto", "small", "original"]

TimmModel = Any
"""A module with forward_features and forward_head; timm has no type for its models."""


@cache
def list_timm_models() -> list[str]:
    """Return the names of timm's classification models, without tags."""
    return timm.list_models()


def list_tags(architecture: str) -> list[str]:
    """Return the tags of a model's pretrained weights, such as tv_in1k of resnet18."""
    names = timm.list_models(f"{architecture}.*", pretrained=True)
    return [name.partition(".")[2] for name in names]


class TimmNetwork(Network):
    """A model of timm without its last layer, and a new head.

    Its state has the names that timm gives it, after `model.`. `stem`: "small" makes the first
    convolution 3x3 with stride 1 and removes the max-pool after it (He et al., 2015, for CIFAR-10),
    "original" keeps both, "auto" chooses by the size. Models that cut the image into patches keep
    their first layer. Other options go to `timm.create_model`. Raises ValueError for invalid
    options, and for a size that the model can't take.
    """

    def __init__(
        self,
        name: str,
        classes: int,
        channels: int,
        size: int,
        stem: Stem = "auto",
        **options: Any,
    ):
        super().__init__()
        if stem not in get_args(Stem):
            raise ValueError(f"network {name}: stem must be auto, small or original, not {stem!r}")
        for option in RESERVED_OPTIONS:
            if option in options:
                raise ValueError(
                    f"network {name}: option {option} follows from the data and the weights; leave "
                    "it out"
                )

        self.name = name
        self.arguments: dict[str, Any] = {"in_chans": channels}
        if _is_built_for_one_size(name):
            self.arguments["img_size"] = size
        self.arguments |= options
        self.model: TimmModel = _build_model(name, self.arguments)
        if stem == "small" or (stem == "auto" and size <= SMALL_SIZE):
            _shrink_stem(self.model)

        features, embedding = self._compute_shapes(channels, size)
        self.axes = _find_pooled_axes(self.model, features)
        self.spatial = self.axes is not None
        if self.spatial:
            self.dropout = options.get("drop_rate", 0.0)  # otherwise timm's own head applies it
        self.head = nn.Linear(embedding[1], classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [N,C,H,W] to features: [N,D,h,w] where spatial, else [N,D]."""
        features = self.model.forward_features(x)
        if self.axes is None:
            return self.model.forward_head(features)
        return features if self.axes == CHANNELS_FIRST else features.permute(0, 3, 1, 2)

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Return all parameters in groups, ordered from the first layer to the head.

        timm's `group_matcher` says which belong together: the stem, and then block by block.
        """
        if not hasattr(self.model, "group_matcher"):
            return super().layer_groups()
        groups = group_parameters(self.model, self.model.group_matcher(), return_values=True)
        ordered = [groups[number] for number in sorted(groups)]
        return [*ordered, list(self.head.parameters())]

    def convert_weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a file under the names of this network's state.

        Files of timm, and of the libraries that timm knows for this model, are read by timm itself,
        which also fits position embeddings to the size and the first layer to the channels. Files
        that it can't read keep their names.
        """
        if all(name.startswith(("model.", "head.")) for name in tensors):
            return tensors
        if LITE_STEM in tensors:
            tensors = _rename_efficientnet_lite(self.name, tensors)

        classifier = _classifier_path(self.name)
        classes = len(tensors.get(f"{classifier}.weight", ()))
        overlay = {"state_dict": tensors, "num_classes": classes, "label_offset": None}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader = timm.create_model(
                    self.name,
                    pretrained=True,
                    pretrained_cfg_overlay=overlay,
                    num_classes=classes,
                    **self.arguments,
                )
        except Exception:  # timm's functions for other libraries' files raise anything
            return tensors

        converted: dict[str, Tensor] = {}
        for name, value in reader.state_dict().items():
            path, _, kind = name.rpartition(".")
            if path == classifier:
                converted[f"head.{kind}"] = value
            elif not path.startswith(f"{classifier}."):
                converted[f"model.{name}"] = value
        return converted

    @torch.no_grad()
    def _compute_shapes(self, channels: int, size: int) -> tuple[torch.Size, torch.Size]:
        """Return the shapes of features and embedding. Raises ValueError for an unsuitable size.

        Tensors without data run through the model, which costs neither memory nor arithmetic.
        """
        self.model.eval()
        device = next(self.model.parameters()).device
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                images = torch.empty(2, channels, size, size, device=device)
                features = self.model.forward_features(images)
                embedding = self.model.forward_head(features)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"network {self.name}: images of {size} pixels don't work with it "
                f"({_one_line(error)}); give another size, often 224, or another network"
            ) from error
        self.model.train()
        return features.shape, embedding.shape


@torch.no_grad()
def _find_pooled_axes(model: TimmModel, features: torch.Size) -> tuple[int, int] | None:
    """Return the axes over which the model averages its features before the last linear layer.

    None where it does something else, so that there is no class-activation map.
    """
    if len(features) != 4:
        return None
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(features, generator=generator, device="cpu")
    model.eval()
    try:
        pooled = model.forward_head(maps)
    except RuntimeError:  # it has layers, which are on another device
        return None
    finally:
        model.train()

    for axes in (CHANNELS_FIRST, CHANNELS_LAST):
        average = maps.mean(axes)
        if pooled.shape == average.shape and torch.allclose(pooled, average, atol=1e-6):
            return axes
    return None


def _is_built_for_one_size(name: str) -> bool:
    """Whether timm builds the model for images of one size, `img_size`, as most transformers."""
    config = timm.get_pretrained_cfg(name)
    return config is not None and config.fixed_input_size


def _build_model(name: str, arguments: dict[str, Any]) -> TimmModel:
    """Build a model of timm that ends with its embedding."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return timm.create_model(name, num_classes=0, **arguments)
    except TypeError as error:
        raise ValueError(
            f"network {name}: {_one_line(error)}; its options are stem and those of "
            "timm.create_model"
        ) from error
    except (ValueError, AssertionError, RuntimeError) as error:
        raise ValueError(f"network {name}: {_one_line(error)} (built with {arguments})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _shrink_stem(model: nn.Module) -> None:
    """Make the first convolution 3x3 with stride 1, and remove the max-pool after it.

    A convolution that cuts the image into patches, or has stride 1 already, stays.
    """
    layers = dict(model.named_modules())
    convolutions = [path for path, layer in layers.items() if isinstance(layer, nn.Conv2d)]
    if not convolutions:
        return
    path = convolutions[0]
    old = layers[path]
    assert isinstance(old, nn.Conv2d)
    if old.stride == (1, 1) or old.stride == old.kernel_size:
        return

    new = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    model.set_submodule(path, new)
    for pool in STEM_POOLS:
        if pool in layers:
            model.set_submodule(pool, nn.Identity())


def _classifier_path(name: str) -> str:
    """Return the path of the last linear layer in timm's model."""
    config = timm.get_pretrained_cfg(name)
    path = config.classifier if config is not None else None
    if isinstance(path, tuple | list):
        path = path[0]  # of a model with one more head for distillation
    return path or "classifier"


LITE_STEM = "_conv_stem.weight"
"""A name that only files of the package efficientnet-lite-pytorch have."""

LITE_CLASSIFIER = "_fc."


def _rename_efficientnet_lite(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of efficientnet-lite-pytorch the names of the same network in timm.

    Both libraries list the layers in the same order.
    """
    with torch.device("meta"):
        model = timm.create_model(name)
    classifier = _classifier_path(name)
    names = [key for key in model.state_dict() if not key.startswith(f"{classifier}.")]
    values = [value for key, value in tensors.items() if not key.startswith(LITE_CLASSIFIER)]
    if len(names) != len(values):
        return tensors  # of another network of the family

    renamed = dict(zip(names, values, strict=True))
    for kind in ("weight", "bias"):
        renamed[f"{classifier}.{kind}"] = tensors[f"{LITE_CLASSIFIER}{kind}"]
    return renamed
