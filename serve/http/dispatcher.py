"""The HTTP process's side of the workers: a connection to each, who is ready, and who has which job."""

import asyncio
import json
import time
from collections.abc import Callable
from functools import partial
from itertools import count

from serve import logs
from serve.metrics.shared_counters import SharedCounters
from serve.wire import CANCEL, MODEL_INFO, Answer, Job, pack_job, take_answers

RETRY_SECONDS = 0.02
LOST = b"the worker was lost before it answered; try again"
UNANSWERED = Answer(0, 0, 0, b"")  # stands in the place of an answer until it is there


class Ask:
    """The images of one request on their way. `done` is called once: when each has an answer, or at the deadline."""

    __slots__ = ("again", "answers", "asked", "deadline", "done", "expired", "jobs", "left", "pool")

    def __init__(
        self, pool: "Pool", answers: list[Answer], deadline: float, done: Callable[["Ask"], None]
    ):
        """`deadline`: by time.monotonic."""
        self.pool, self.answers, self.deadline, self.done, self.expired = (
            pool,
            answers,
            deadline,
            done,
            False,
        )
        self.asked = [i for i, answer in enumerate(answers) if answer is UNANSWERED]
        self.left = len(self.asked)
        self.jobs: list[tuple[Channel, int]] = []
        self.again: Callable[[list[int]], None] | None = None  # asks for these images once more

    def put(self, index: int, answer: Answer) -> None:
        self.answers[index] = answer
        self.left -= 1
        if self.left:
            return
        good = [i for i, a in enumerate(self.answers) if a.status == 200] if self.again else []
        if (
            self.again and len({self.answers[i].version for i in good}) > 1
        ):  # the model was swapped between them
            again, self.again = self.again, None
            again(good)
        else:
            self.finish()

    def finish(self) -> None:
        self.again = None  # no ring of references is left
        self.pool.asks.pop(self, None)
        for index in self.asked:
            self.pool.counters.add("images", outcome(self.answers[index].status))
        try:
            self.done(self)
        except Exception:  # what is wrong with one request must not reach the others of its worker
            logs.logger.exception("an answer could not be given")

    def expire(self) -> None:
        self.expired = True
        self.cancel()
        self.finish()

    def cancel(self) -> None:
        """Nobody waits any more: what is not done yet is dropped, not done late, and `done` is not called."""
        self.again = None
        self.pool.asks.pop(self, None)
        for channel, number in self.jobs:
            channel.cancel(number)


def outcome(status: int) -> str:
    """What became of an image, by the status of its answer; 0 where there was none in time."""
    return (
        "answered"
        if status == 200
        else "expired"
        if not status
        else "refused"
        if status < 500
        else "failed"
    )


class Channel(asyncio.Protocol):
    """A connection to one worker. What is written in one turn of the event loop leaves in one write."""

    def __init__(self, pool: "Pool"):
        self.pool, self.buffer, self.out = pool, bytearray(), list[bytes]()
        self.waiting: dict[int, tuple[Ask, int]] = {}
        self.ids = count(1)
        self.model: dict | None = None  # what the worker serves; None until it has told
        self.version = 0  # of that model
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # asyncio's base is wider
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Every job that the worker had is answered with 503, at once."""
        if not self.closed.done():
            self.closed.set_result(None)
        self.model = None
        self.pool.look()
        for number, (ask, index) in list(self.waiting.items()):
            ask.put(index, Answer(number, 503, 0, LOST))
        self.waiting.clear()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        for answer in take_answers(self.buffer):
            if answer.id == MODEL_INFO:
                self.model = json.loads(answer.body)
                self.version = answer.version
                self.pool.told(self.model, self.version)
            elif place := self.waiting.pop(answer.id, None):
                self.version = (
                    answer.version or self.version
                )  # a worker may answer by a model before it tells of it
                place[0].put(place[1], answer)

    def send(self, job: Job) -> None:
        if not self.out:
            self.pool.loop.call_soon(self._flush)
        self.out.append(pack_job(job))

    def _flush(self) -> None:
        out, self.out = self.out, []
        if not self.transport.is_closing():
            self.transport.writelines(out)

    def ask(
        self, ask: Ask, index: int, body: bytes, deadline: float, top_k: int, flags: int
    ) -> None:
        number = next(self.ids) & 0xFFFFFFFF or next(self.ids) & 0xFFFFFFFF  # never MODEL_INFO
        self.waiting[number] = (ask, index)
        ask.jobs.append((self, number))
        self.send(Job(number, deadline, top_k, flags, body))

    def cancel(self, number: int) -> None:
        if self.waiting.pop(number, None):
            self.send(Job(number, 0.0, 0, CANCEL, b""))


class Pool:
    """All workers."""

    def __init__(self, run: str, workers: int, counters: SharedCounters):
        self.run, self.size, self.counters, self.tell_ready = (
            run,
            workers,
            counters,
            counters.setter("ready"),
        )
        self.loop = asyncio.get_running_loop()
        self.channels: list[Channel | None] = [None] * workers
        self.usable: list[Channel] = []
        self.model: dict = {}  # what was told last
        self.version = 0  # of that model
        self.name = b""  # of the model, as JSON
        self.on_version: Callable[[], None] = lambda: None  # called when another one is told
        self.asks: dict[Ask, None] = {}  # those under way, by deadline
        self.timer: asyncio.TimerHandle | None = (
            None  # one for all: to make and cancel one costs as much as to parse
        )
        self.tasks = [self.loop.create_task(self._keep(i)) for i in range(workers)]

    async def _keep(self, index: int) -> None:
        """Stay connected to a worker, whoever takes its place."""
        path = f"{self.run}/worker-{index}.sock"
        while True:
            try:
                _, channel = await self.loop.create_unix_connection(lambda: Channel(self), path)
            except OSError:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            self.channels[index] = channel
            self.look()
            await channel.closed
            self.channels[index] = None

    def told(self, model: dict, version: int) -> None:
        changed, self.model, self.version = version != self.version, model, version
        self.name = json.dumps(model["name"]).encode()
        if changed:
            self.on_version()
        self.look()

    def look(self) -> None:
        """See who can be given work now."""
        self.usable = [
            channel
            for channel in self.channels
            if channel is not None and channel.model is not None
        ]
        self.tell_ready(self.ready)

    @property
    def ready(self) -> bool:
        return len(self.usable) == self.size

    def ask(
        self,
        images: list[bytes],
        answers: list[Answer],
        seconds: float,
        top_k: int,
        flags: int,
        done: Callable[[Ask], None],
    ) -> Ask:
        """Hand each image without an answer to the worker with the least to do. There must be a usable one.

        While workers swap one after the other, the images of one request go to those of one version.
        """
        ask = Ask(self, answers, time.monotonic() + seconds, done)
        self.asks[ask] = None
        if self.timer is None:
            self.timer = self.loop.call_later(seconds, self.expire)
        if len(images) > 1:
            ask.again = partial(self.ask_again, ask, images, top_k, flags)
        self.hand_out(ask, images, top_k, flags)
        if not ask.left:
            self.loop.call_soon(
                lambda: ask.finish() if ask in self.asks else None
            )  # the client may leave first
        return ask

    def hand_out(self, ask: Ask, images: list[bytes], top_k: int, flags: int) -> None:
        usable = self.usable
        if len(images) > 1 and len(usable) > 1:
            usable = [channel for channel in usable if channel.version == self.version] or usable
        for index, body in enumerate(images):
            if ask.answers[index] is UNANSWERED:
                channel = (
                    usable[0] if len(usable) == 1 else min(usable, key=lambda c: len(c.waiting))
                )
                channel.ask(ask, index, body, ask.deadline, top_k, flags)

    def ask_again(
        self, ask: Ask, images: list[bytes], top_k: int, flags: int, indices: list[int]
    ) -> None:
        """What two versions answered gets its answers from one, the new."""
        if not self.usable:
            return ask.finish()
        for index in indices:
            ask.answers[index] = UNANSWERED
        ask.left = len(indices)
        self.hand_out(ask, images, top_k, flags)

    def expire(self) -> None:
        """End what is past its deadline, and look again when the next one is due."""
        asks, now = self.asks, time.monotonic()
        while (first := next(iter(asks), None)) is not None and first.deadline <= now:
            first.expire()
        self.timer = (
            None if first is None else self.loop.call_later(first.deadline - now, self.expire)
        )

    def unsent(self) -> int:
        """Bytes of jobs that workers have not taken: a hung one leaves them where they are, past their deadlines."""
        return sum(channel.transport.get_write_buffer_size() for channel in self.usable)

    def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        for channel in self.channels:
            if channel is not None:
                channel.transport.close()
