"""Answers by the digest of the image: off unless asked for, bounded, and empty again whenever the model changes."""

import hashlib
from collections import OrderedDict

from serve.wire import Answer


class Cache:
    """The least recently used answers of one HTTP process. Only predictions are kept, errors never."""

    def __init__(self, entries: int, counters):
        self.entries, self.counters = entries, counters
        self.kept: OrderedDict[bytes, Answer] = OrderedDict()
        self.served: dict | None = None

    @staticmethod
    def key(body: bytes, top_k: int, flags: int) -> bytes:
        """SHA-256, since whoever can make two images collide could plant answers."""
        return hashlib.sha256(body).digest() + b"%d,%d" % (top_k, flags)

    def get(self, key: bytes, served: dict) -> Answer | None:
        """`served` is the description of the model that answers now; another than before empties the cache."""
        if served is not self.served:
            self.kept.clear()
            self.served = served
        answer = self.kept.get(key)
        self.counters.add("cache", "miss" if answer is None else "hit")
        if answer is not None:
            self.kept.move_to_end(key)
        return answer

    def put(self, key: bytes, served: dict, answer: Answer) -> None:
        """Keep an answer that `served` gave, with the times of a hit: none."""
        if (
            answer.status != 200
            or served is not self.served
            or str(answer.version) != served["version"]
        ):
            return
        self.kept[key] = answer._replace(queue_us=0, decode_us=0, infer_us=0)
        if len(self.kept) > self.entries:
            self.kept.popitem(last=False)
