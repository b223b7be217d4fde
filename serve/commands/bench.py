"""A small load test of a running service, so that a deployment can be sized: a step for each number of clients.

Every client sends the next request as soon as its last was answered. Run it from another machine where you can: here it
takes cores from the service. Ctrl-C shows the steps that are done.
"""

import argparse
import asyncio
import json
import ssl
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from serve import options

MAX_CLIENTS, MAX_SECONDS = 1024, 300
TIMEOUT = 60.0  # seconds for one answer


@dataclass
class Step:
    """What one number of clients saw."""

    clients: int
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)  # seconds, of answers with status 200
    statuses: Counter = field(default_factory=Counter)

    def percentile(self, share: float) -> float:
        """Milliseconds."""
        ordered = sorted(self.latencies)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Target:
    """Where to, and the bytes of a request for each image."""

    def __init__(self, url: str, images: list[bytes], key: bytes | None):
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"{url}: not the URL of a service; it looks like http://localhost:8000"
            )
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.host, self.port = parts.hostname, parts.port or (443 if self.tls else 80)
        self.path = parts.path.rstrip("/")
        self.key = f"X-API-Key: {key.decode()}\r\n" if key else ""
        self.requests = [self.request("POST", "/predict", image) for image in images]

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        kind = f"Content-Type: image/*\r\nContent-Length: {len(body)}\r\n" if body else ""
        return (
            f"{method} {self.path}{path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n{self.key}{kind}"
            f"\r\n"
        ).encode() + body

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port, ssl=self.tls)


async def exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> tuple[int, bytes, bool]:
    """Status, body, and whether the connection stays open."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
    return int(head[9:12]), await reader.readexactly(length), b"connection: close" not in head


async def client(target: Target, step: Step, end: float, first: int) -> None:
    """Ask until the end; a connection that breaks is counted and opened anew."""
    number, writer = first, None
    while time.perf_counter() < end:
        try:
            async with asyncio.timeout(TIMEOUT):
                if writer is None:
                    reader, writer = await target.open()
                began = time.perf_counter()
                status, _, stays = await exchange(
                    reader, writer, target.requests[number % len(target.requests)]
                )
        except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError) as error:
            step.statuses[type(error).__name__] += 1
            stays = False
            await asyncio.sleep(0.1)
        else:
            step.statuses[status] += 1
            if status == 200:
                step.latencies.append(time.perf_counter() - began)
        if not stays and writer is not None:
            writer.close()
            writer = None
        number += 1
    if writer is not None:
        writer.close()


async def run(target: Target, clients: int, seconds: float) -> Step:
    step, began = Step(clients), time.perf_counter()
    await asyncio.gather(*(client(target, step, began + seconds, i) for i in range(clients)))
    step.seconds = time.perf_counter() - began
    return step


async def get(
    target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str
) -> bytes:
    """Raises ValueError for any status but 200."""
    status, body, _ = await exchange(reader, writer, target.request("GET", path))
    if status != 200:
        raise ValueError(f"GET {path} gave status {status}; images can be given with --image")
    return body


async def samples(target: Target) -> list[bytes]:
    """The sample images of the service itself. Raises ValueError where there is no service, or none of ours."""
    try:
        async with asyncio.timeout(TIMEOUT):
            reader, writer = await target.open()
            try:
                count = len(json.loads(await get(target, reader, writer, "/model"))["samples"])
                found = [await get(target, reader, writer, f"/samples/{i}") for i in range(count)]
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        raise ValueError(f"nothing answers at {target.host}:{target.port}: {error}") from error
    except (ValueError, KeyError, TypeError, asyncio.IncompleteReadError) as error:
        raise ValueError(
            f"{target.host}:{target.port} is not an Imago service, or not ready: {error}"
        ) from error
    if not found:
        raise ValueError("the service has no sample images; give some with --image")
    return found


def main(arguments: list[str]) -> int:
    """0: every answer was 200, 1: some were not, 2: bad usage."""
    parser = argparse.ArgumentParser("python -m serve bench", description=__doc__)
    parser.add_argument("url", metavar="URL", help="of the service, e.g. http://localhost:8000")
    parser.add_argument(
        "--clients", default="1,8,32", help="clients at once, a step for each (default: 1,8,32)"
    )
    parser.add_argument("--seconds", type=float, default=5, help="length of a step (default: 5)")
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        help="image to send; by default the service's samples",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options.add(parser, options.KEY)
    given = parser.parse_args(arguments)
    counts = list(numbers(given.clients))
    if not 0 < given.seconds <= MAX_SECONDS:
        raise ValueError(f"--seconds must be above 0 and at most {MAX_SECONDS}")
    try:
        images = [path.read_bytes() for path in given.image or ()]
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from error
    key = options.read(
        {name: value for name, value in vars(given).items() if name in options.KEY}
    ).key()
    if not images:
        images = asyncio.run(samples(Target(given.url, [], key)))
    target, steps = Target(given.url, images, key), list[Step]()
    try:
        for count in counts:
            print(f"{count} clients for {given.seconds:g} s", file=sys.stderr)
            steps.append(asyncio.run(run(target, count, given.seconds)))
    finally:  # after Ctrl-C too
        (as_json if given.json else as_table)(steps)
    return 0 if all(set(step.statuses) == {200} for step in steps) else 1


def numbers(text: str) -> Iterator[int]:
    for part in text.split(","):
        if not part.strip().isdecimal() or not 1 <= int(part) <= MAX_CLIENTS:
            raise ValueError(
                f"--clients must be numbers from 1 to {MAX_CLIENTS}, with commas between"
            )
        yield int(part)


def summary(step: Step) -> dict:
    """Times in milliseconds."""
    times = (
        {}
        if not step.latencies
        else {
            "p50_ms": step.percentile(0.5),
            "p90_ms": step.percentile(0.9),
            "p99_ms": step.percentile(0.99),
            "max_ms": 1000 * max(step.latencies),
            "mean_ms": 1000 * statistics.fmean(step.latencies),
        }
    )
    return {
        "clients": step.clients,
        "per_second": len(step.latencies) / step.seconds,
        **times,
        "statuses": {str(status): count for status, count in step.statuses.items()},
    }


def as_json(steps: list[Step]) -> None:
    print(json.dumps([summary(step) for step in steps], indent=1))


def as_table(steps: list[Step]) -> None:
    table = Table("clients", "answers/s", "p50 ms", "p90 ms", "p99 ms", "max ms", "other than 200")
    for step in map(summary, steps):
        other = ", ".join(
            f"{count} x {status}" for status, count in step["statuses"].items() if status != "200"
        )
        times = [
            f"{step[name]:.1f}" if name in step else ""
            for name in ("p50_ms", "p90_ms", "p99_ms", "max_ms")
        ]
        table.add_row(str(step["clients"]), f"{step['per_second']:.1f}", *times, other)
    Console().print(table)
