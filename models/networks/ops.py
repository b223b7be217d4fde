"""Make `import torchvision` (and lightning, through torchmetrics) work beside a torch that its C++ ops don't fit.

torchvision's wheels on PyPI are linked to CUDA; beside a CPU build of torch its library does not load, and the import
fails with «operator torchvision::nms does not exist», as it registers shapes for ops that are not there. Declaring the
two schemas first is enough. Classification uses neither op.
"""

import importlib.util
from pathlib import Path

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def declare_missing() -> torch.library.Library | None:
    """Load torchvision's ops, or else declare the schemas. The library given back must be kept: it holds them."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return None
    for folder in spec.submodule_search_locations or ():
        for file in [*Path(folder).glob("_C*.so"), *Path(folder).glob("_C*.pyd")]:
            try:
                torch.ops.load_library(file)
                return None
            except (OSError, RuntimeError):
                continue
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    return library
