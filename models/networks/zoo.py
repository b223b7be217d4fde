"""torchvision's classification models by name, with a head for K classes, also for one channel and small images."""

import warnings
from functools import cache
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn

from models.networks.base import Network

SMALL = (
    64  # pixels up to which a stem that shrinks the image at once would lose what there is to see
)

# How maps reach global average pooling, by class; where a class is missing the last linear layer is simply cut off.
TRUNKS = {
    "ResNet": "conv1 bn1 relu maxpool layer1 layer2 layer3 layer4",
    "DenseNet": "features relu",
    "EfficientNet": "features",
    "MobileNetV2": "features",
    "SqueezeNet": "features",
    "MNASNet": "layers",
    "RegNet": "stem trunk_output",
    "ShuffleNetV2": "conv1 maxpool stage2 stage3 stage4 conv5",
    "SwinTransformer": "features norm permute",
    "GoogLeNet": "conv1 maxpool1 conv2 conv3 maxpool2 inception3a inception3b maxpool3 inception4a inception4b "
    "inception4c inception4d inception4e maxpool4 inception5a inception5b",
}
# Pools right behind the first convolution, which go for small images.
POOLS = {
    "ResNet": "maxpool",
    "DenseNet": "features.pool0",
    "GoogLeNet": "maxpool1",
    "ShuffleNetV2": "maxpool",
    "SqueezeNet": "features.2",
    "AlexNet": "features.2",
}
PATCHES = (
    "VisionTransformer",
    "SwinTransformer",
    "ConvNeXt",
)  # their first convolution cuts patches and stays


@cache
def names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


class Zoo(Network):
    """One model of torchvision, its state under the names torchvision gives it (`model.…`), less the last layer.

    `stem`: "small" makes the first convolution 3x3 with stride 1 and drops the max-pool behind it, "original" keeps
    both, "auto" chooses by the size. Other options go to torchvision's builder.
    """

    def __init__(
        self,
        name: str,
        classes: int,
        channels: int,
        size: int,
        stem: Literal["auto", "small", "original"] = "auto",
        **options: Any,
    ):
        super().__init__()
        if stem not in ("auto", "small", "original"):
            raise ValueError(f"network {name}: stem must be auto, small or original, not {stem!r}")
        model = _build(name, classes, size, options)
        self.kind = type(model).__name__
        if (stem == "small" or (stem == "auto" and size <= SMALL)) and self.kind not in PATCHES:
            _shrink_stem(model, POOLS.get(self.kind))
        if channels != 3:
            _first_conv(model, lambda conv: _convolution(conv, channels, sum_rgb(conv.weight.data)))
        self.spatial = self.kind in TRUNKS
        if (
            self.kind == "SqueezeNet"
        ):  # its classifier is dropout, 1x1 convolution, ReLU, pooling: pool before instead
            self.head = nn.Linear(512, classes)
            self.dropout, model.classifier = 0.5, nn.Identity()
        else:
            self.head, self.dropout = _cut_head(model)
        self.model = model
        self.check(name, channels, size)

    def trunk(self, x: Tensor) -> Tensor:
        if not self.spatial:
            return self.model(x)
        for part in TRUNKS[self.kind].split():
            layer = getattr(self.model, part, None)
            x = nn.functional.relu(x) if layer is None else layer(x)
        return x

    @torch.no_grad()
    def check(self, name: str, channels: int, size: int) -> None:
        """One pass, without memory or arithmetic, to see that the size works. Raises ValueError."""
        training = self.training
        try:
            shapes = {key: value.to("meta") for key, value in self.state_dict().items()}
            torch.func.functional_call(
                self.eval(), shapes, torch.empty(2, channels, size, size, device="meta")
            )
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"network {name}: images of {size} pixels don't work with it ({_line(error)}); "
                "give another size, often 224, or another network"
            ) from error
        self.train(training)


def _build(name: str, classes: int, size: int, options: dict[str, Any]) -> nn.Module:
    builder = torchvision.models.get_model_builder(name)
    defaults: dict[str, Any] = {"num_classes": classes}
    if name in (
        "googlenet",
        "inception_v3",
    ):  # auxiliary heads would give three answers in training
        defaults |= {"aux_logits": False, "init_weights": True}
    if name.startswith("vit"):
        defaults["image_size"] = size
    if name.startswith("maxvit"):
        defaults["input_size"] = (size, size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return builder(**defaults | options)
    except TypeError as error:
        raise ValueError(
            f"network {name}: {_line(error).replace('__init__()', 'torchvision')}; "
            f"its options are those of torchvision.models.{builder.__name__}, and stem"
        ) from error
    except (ValueError, AssertionError, RuntimeError) as error:
        raise ValueError(
            f"network {name}: {_line(error)} (images of {size} pixels, options {options})"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _cut_head(model: nn.Module) -> tuple[nn.Linear, float]:
    """Take off the last linear layer and a dropout right before it."""
    path, head = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    model.set_submodule(path, nn.Identity())
    parent, _, last = path.rpartition(".")
    before = f"{parent}.{int(last) - 1}" if last.isdecimal() and int(last) else "dropout"
    layer = dict(model.named_modules()).get(before)
    if not isinstance(layer, nn.Dropout):
        return head, 0.0
    model.set_submodule(before, nn.Identity())
    return head, layer.p


def _first_conv(model: nn.Module, change: Any) -> None:
    path, conv = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    model.set_submodule(path, change(conv))


def _shrink_stem(model: nn.Module, pool: str | None) -> None:
    """A first convolution of 3x3 with stride 1, no max-pool behind it."""

    def small(conv: nn.Conv2d) -> nn.Conv2d:
        new = nn.Conv2d(
            conv.in_channels, conv.out_channels, 3, padding=1, bias=conv.bias is not None
        )
        nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
        if new.bias is not None:
            nn.init.zeros_(new.bias)
        return new

    _first_conv(model, small)
    if pool:
        model.set_submodule(pool, nn.Identity())


def _convolution(conv: nn.Conv2d, channels: int, weight: Tensor) -> nn.Conv2d:
    new = nn.Conv2d(
        channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        bias=conv.bias is not None,
    )  # torch types the sizes of a Conv2d as tuples of any length
    new.load_state_dict(conv.state_dict() | {"weight": weight})
    return new


def sum_rgb(weight: Tensor) -> Tensor:
    """Kernels [F,3,k,k] for one channel [F,1,k,k]: their sum answers a gray image as they answer it in RGB."""
    return weight.sum(1, keepdim=True)
