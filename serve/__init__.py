"""The service: a bundle behind a batched HTTP API, on LitServe and onnxruntime, without torch.

A bundle can also be used in a Python program, without a server:

    from serve import Model

    model = Model.open("artifacts/store/digits/latest")
    prediction = model.predict("seven.png")
    print(prediction.label, prediction.confidence)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.model import Model as Model
    from serve.prediction import ClassConfidence as ClassConfidence
    from serve.prediction import Prediction as Prediction

__all__ = ["ClassConfidence", "Model", "Prediction"]


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` when it is first used: the packages it needs take a second."""
    if name == "Model":
        from serve.model import Model

        return Model
    if name in ("ClassConfidence", "Prediction"):
        from serve import prediction

        return getattr(prediction, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
