"""torchvision's classification models by name, with a head for K classes.

They also take one channel and small images.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn

from models.networks.base import Network

SMALL_SIZE = 64
"""Pixels up to which a stem that shrinks the image at once would lose its details."""

# Class of torchvision -> its layers up to global average pooling; `relu` is a function where the
# class has no such layer. Of other classes only the last linear layer is removed, so their features
# are [N,D].
FEATURE_LAYERS = {
    "ResNet": "conv1 bn1 relu maxpool layer1 layer2 layer3 layer4",
    "DenseNet": "features relu",
    "EfficientNet": "features",
    "MobileNetV2": "features",
    "SqueezeNet": "features",
    "MNASNet": "layers",
    "RegNet": "stem trunk_output",
    "ShuffleNetV2": "conv1 maxpool stage2 stage3 stage4 conv5",
    "SwinTransformer": "features norm permute",
    "GoogLeNet": (
        "conv1 maxpool1 conv2 conv3 maxpool2 inception3a inception3b maxpool3 inception4a "
        "inception4b inception4c inception4d inception4e maxpool4 inception5a inception5b"
    ),
}

# Class -> the max-pool right after the first convolution, which is removed for small images.
STEM_POOLS = {
    "ResNet": "maxpool",
    "DenseNet": "features.pool0",
    "GoogLeNet": "maxpool1",
    "ShuffleNetV2": "maxpool",
    "SqueezeNet": "features.2",
    "AlexNet": "features.2",
}

PATCH_EMBEDDING_CLASSES = ("VisionTransformer", "SwinTransformer", "ConvNeXt")
"""Classes whose first convolution cuts the image into patches: it is never replaced."""

AUXILIARY_HEADS = ("aux1", "aux2", "AuxLogits")
"""Of GoogLeNet and Inception, for training only: their weights are not used."""

SQUEEZENET_FEATURES = 512
SQUEEZENET_DROPOUT = 0.5

Stem = Literal["auto", "small", "original"]


@cache
def list_torchvision_models() -> list[str]:
    """Return the names of torchvision's classification models."""
    return torchvision.models.list_models(module=torchvision.models)


class TorchvisionNetwork(Network):
    """A model of torchvision without its last layer, and a new head.

    Its state has the names that torchvision gives it, after `model.`. `stem`: "small" makes the
    first convolution 3x3 with stride 1 and removes the max-pool after it (He et al., 2015, for
    CIFAR-10), "original" keeps both, "auto" chooses by the size. Other options go to torchvision's
    builder. Raises ValueError for invalid options, and for a size that the model can't take.
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
        if stem not in ("auto", "small", "original"):
            raise ValueError(f"network {name}: stem must be auto, small or original, not {stem!r}")
        model = _build_model(name, classes, size, options)
        self.family = type(model).__name__
        self.spatial = self.family in FEATURE_LAYERS

        is_small = stem == "small" or (stem == "auto" and size <= SMALL_SIZE)
        if is_small and self.family not in PATCH_EMBEDDING_CLASSES:
            _shrink_stem(model, STEM_POOLS.get(self.family))
        if channels != 3:
            _replace_first_convolution(model, lambda old: _with_channels(old, channels))

        if self.family == "SqueezeNet":
            # Its classifier is dropout, 1x1 convolution, ReLU and pooling. Pool first instead.
            head_path = "classifier"
            model.classifier = nn.Identity()
            self.head = nn.Linear(SQUEEZENET_FEATURES, classes)
            self.dropout = SQUEEZENET_DROPOUT
        else:
            head_path, self.head, self.dropout = _cut_head(model)
        self.replaced_layers = (head_path, *AUXILIARY_HEADS)
        self.model = model
        self._check_size(name, channels, size)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [N,C,H,W] to features: [N,D,h,w] where spatial, else [N,D]."""
        if not self.spatial:
            return self.model(x)
        for layer_name in FEATURE_LAYERS[self.family].split():
            layer = getattr(self.model, layer_name, None)
            x = nn.functional.relu(x) if layer is None else layer(x)
        return x

    @torch.no_grad()
    def _check_size(self, name: str, channels: int, size: int) -> None:
        """Run shapes through the network, without memory or arithmetic. Raises ValueError."""
        was_training = self.training
        shapes = {key: value.to("meta") for key, value in self.state_dict().items()}
        images = torch.empty(2, channels, size, size, device="meta")
        try:
            torch.func.functional_call(self.eval(), shapes, images)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"network {name}: images of {size} pixels don't work with it "
                f"({_one_line(error)}); give another size, often 224, or another network"
            ) from error
        self.train(was_training)


def _build_model(name: str, classes: int, size: int, options: dict[str, Any]) -> nn.Module:
    builder = torchvision.models.get_model_builder(name)
    arguments: dict[str, Any] = {"num_classes": classes}
    if name in ("googlenet", "inception_v3"):
        arguments["aux_logits"] = False  # auxiliary heads return three outputs in training
        arguments["init_weights"] = True
    if name.startswith("vit"):
        arguments["image_size"] = size
    if name.startswith("maxvit"):
        arguments["input_size"] = (size, size)
    arguments |= options

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return builder(**arguments)
    except TypeError as error:
        cause = _one_line(error).replace("__init__()", "torchvision")
        raise ValueError(
            f"network {name}: {cause}; its options are stem and those of "
            f"torchvision.models.{builder.__name__}"
        ) from error
    except (ValueError, AssertionError, RuntimeError) as error:
        raise ValueError(
            f"network {name}: {_one_line(error)} (images of {size} pixels, options {options})"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _cut_head(model: nn.Module) -> tuple[str, nn.Linear, float]:
    """Remove the last linear layer and a dropout right before it.

    Returns the layer's name, the layer, and the probability of the dropout, 0 without one.
    """
    linear_layers = [
        (path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Linear)
    ]
    path, head = linear_layers[-1]
    model.set_submodule(path, nn.Identity())

    # In a Sequential the layer before it has the next smaller number.
    parent, _, name = path.rpartition(".")
    has_previous = name.isdecimal() and int(name) > 0
    previous_path = f"{parent}.{int(name) - 1}" if has_previous else "dropout"
    previous = dict(model.named_modules()).get(previous_path)
    if not isinstance(previous, nn.Dropout):
        return path, head, 0.0
    model.set_submodule(previous_path, nn.Identity())
    return path, head, previous.p


def _replace_first_convolution(model: nn.Module, replace: Callable[[nn.Conv2d], nn.Conv2d]) -> None:
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            model.set_submodule(path, replace(layer))
            return


def _shrink_stem(model: nn.Module, pool: str | None) -> None:
    """Make the first convolution 3x3 with stride 1, and remove the max-pool after it."""
    _replace_first_convolution(model, _make_3x3)
    if pool:
        model.set_submodule(pool, nn.Identity())


def _make_3x3(old: nn.Conv2d) -> nn.Conv2d:
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    return new


def _with_channels(old: nn.Conv2d, channels: int) -> nn.Conv2d:
    # torch types the sizes of a Conv2d as tuples of any length.
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    new.load_state_dict(old.state_dict() | {"weight": sum_rgb_kernels(old.weight.data)})
    return new


def sum_rgb_kernels(kernels: Tensor) -> Tensor:
    """Sum kernels [F,3,k,k] to [F,1,k,k].

    They give for a gray image what the three gave for the same image in RGB.
    """
    return kernels.sum(1, keepdim=True)
