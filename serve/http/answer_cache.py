"""A cache of answers by the digest of the image. It is off unless `cache_entries` is set."""

import hashlib
from collections import OrderedDict
from typing import Any

from serve.metrics.shared_counters import SharedCounters
from serve.wire import Answer


class AnswerCache:
    """The most recently used predictions of one HTTP process. Errors are not kept.

    The cache belongs to one model, identified by the description that its worker sent. It is
    emptied when another model is served.
    """

    def __init__(self, max_entries: int, counters: SharedCounters) -> None:
        self.max_entries = max_entries
        self.counters = counters
        self.answers: OrderedDict[bytes, Answer] = OrderedDict()
        self.model: dict[str, Any] | None = None

    @staticmethod
    def build_key(body: bytes, top_k: int, flags: int) -> bytes:
        """Return the key of an image with these parameters.

        SHA-256, because with a weaker hash a client could plant the answer of another image.
        """
        return hashlib.sha256(body).digest() + b"%d,%d" % (top_k, flags)

    def get(self, key: bytes, model: dict[str, Any]) -> Answer | None:
        """Return the answer that `model` gave to this key, if there is one."""
        if model is not self.model:
            self.answers.clear()
            self.model = model

        answer = self.answers.get(key)
        self.counters.add("cache", "miss" if answer is None else "hit")
        if answer is not None:
            self.answers.move_to_end(key)
        return answer

    def put(self, key: bytes, model: dict[str, Any], answer: Answer) -> None:
        """Keep a prediction of `model`. Its times become 0, as a hit takes none."""
        if answer.status != 200:
            return
        if model is not self.model or str(answer.version) != model["version"]:
            return

        self.answers[key] = answer._replace(queue_us=0, decode_us=0, infer_us=0)
        if len(self.answers) > self.max_entries:
            self.answers.popitem(last=False)
