"""Declare `torchvision::nms` and `torchvision::qnms` where torchvision's library does not load.

torchvision's wheels on PyPI are linked to CUDA. With a CPU build of torch their C++ library does
not load, and `import torchvision` fails with "operator torchvision::nms does not exist", because it
registers shape functions for these two operators. Declaring their schemas first is enough to import
it. timm and lightning are concerned too: timm imports torchvision, and lightning does so through
torchmetrics. No classification model uses the operators.
"""

import importlib.util
from pathlib import Path

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def declare_torchvision_ops() -> torch.library.Library | None:
    """Load torchvision's own operators, or else declare their schemas.

    Returns the library that holds the declarations, or None where they are not needed. Keep a
    reference to it: without one the declarations are removed.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or _load_torchvision_library(spec.submodule_search_locations or []):
        return None

    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    return library


def _load_torchvision_library(directories: list[str]) -> bool:
    """Load torchvision's C++ library; return whether that worked."""
    for directory in directories:
        for file in [*Path(directory).glob("_C*.so"), *Path(directory).glob("_C*.pyd")]:
            try:
                torch.ops.load_library(file)
                return True
            except (OSError, RuntimeError):
                continue
    return False
