"""The service: a bundle behind a batched HTTP API, on LitServe and onnxruntime, without torch.

A bundle can also be used in a Python program, without a server:

    from serve import Model

    model = Model.open("artifacts/store", "digits")
    (prediction,) = model.predict([Path("seven.png").read_bytes()])
    print(prediction.label, prediction.confidence)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.model import Model as Model


def __getattr__(name: str) -> Any:
    """Import `Model` when it is first used: the packages that it needs take a second."""
    if name != "Model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    from serve.model import Model

    return Model
