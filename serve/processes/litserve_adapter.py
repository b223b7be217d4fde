"""Nothing where LitServe has a manager process, queues and a response transport: our requests take another way.

That saves a process, its memory, and its polling every second.
"""

import asyncio
from typing import Any

from litserve.transport.base import MessageTransport


class Quiet(MessageTransport):
    """A transport on which nothing is ever sent, and a manager that manages nothing."""

    def send(self, item: Any, consumer_id: int) -> None:
        raise AssertionError("answers leave the worker through PredictLoop")

    async def areceive(self, *args: Any, **kwargs: Any) -> Any:
        await asyncio.Event().wait()

    def close(self, *args: Any, **kwargs: Any) -> None:
        pass

    def shutdown(self) -> None:
        pass
