"""The labelling page: one image after another, for kept images and for doubtful training data.

`LabelApp` answers its requests from a `LabelSource`. The service shows it at /label, `imago serve
label` and `imago train audit --serve` by a server of their own.
"""

from models.labelling.app import LabelApp, LabelProblem, LabelReply
from models.labelling.kept_source import KeptSource
from models.labelling.local_server import LocalRequestHandler, LocalServer, RequestRefused
from models.labelling.source import Item, LabelSource, NewLabel

__all__ = [
    "Item",
    "KeptSource",
    "LabelApp",
    "LabelProblem",
    "LabelReply",
    "LabelSource",
    "LocalRequestHandler",
    "LocalServer",
    "NewLabel",
    "RequestRefused",
]
