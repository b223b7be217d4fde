"""Fuzz the running service with requests that no client library sends.

    python tests/reliability/fuzz_requests.py [--minutes 10] [--clients 8] [--seed 0]
        [--findings DIR] [--out FILE]

Starts the service with a small bundle, an API key and a directory of kept images, then sends valid
requests to every endpoint with changes in the request line, the headers, the framing, the body
(multipart, JSON, Open Inference Protocol, labels, feedback) and the image in it, several in one
connection, some of them cut off or without the key. A finding is a status of 500 or above, a
process that ended, a log line that is no JSON or an error, or a service that does not answer a
plain request at the end. What was sent is kept in DIR.

Prints the report as JSON, which FILE keeps: connections, statuses, memory of the processes before
and after [MB], findings. Exit status 1 where there are findings.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import random
import re
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import project_path  # noqa: F401  makes the imports below possible
from processes import read_usage
from reports import describe_run, print_report

from models.kept import Verdict
from models.labelling.app import PAGE_VERSION
from support import sample_images, tiny_bundle
from support.image_mutations import FORMATS, damage_bytes, mutate_image, write_seed_images
from support.server import Server

READ_TIMEOUT_SECONDS = 20
WARM_UP_SECONDS = 5
MAX_GROWTH_MB = 64
KEY = "fuzz"
KEY_SHARE = 0.95  # of the requests that have the key
STATUS_LINE = re.compile(rb"HTTP/1\.1 (\d{3}) ")

PATHS = (
    b"/predict",
    b"/predict?top_k=3",
    b"/predict?explain=cam&embedding=true",
    b"/predict?embedding=base64",
    b"/predict?top_k=-1&explain=x&%zz",
    b"/v2/models/colours/infer",
    b"/v2/models/colours",
    b"/v2",
    b"/feedback",
    b"/label",
    b"/label/page/../app.py",
    b"/label/items?order=random&show=labelled&limit=99999999999",
    b"/label/items?order=teach&limit=%D9%A3&client=%00",
    b"/label/images/%2e%2e%2fmanifest.json",
    b"/label/similar/" + b"0" * 64,
    b"/label/labels",
    b"/kept/x",
    b"/kept/%00%ff",
    b"/model",
    b"/docs",
    b"/page/page.js",
    b"/samples/0",
    b"/report",
    b"/openapi.json",
    b"/health/ready",
    b"/",
    b"*",
    b"http://x",
    b"//x/../y",
    b"/\xff\xfe",
)
PART_HEADS = (
    b'Content-Disposition: form-data; name="f%d"; filename="a"',
    b'Content-Disposition: form-data; name="f%d"',
    b'Content-Disposition: form-data; name="f%d"; filename="a"\r\nContent-Type: image/png',
    b"Content-Disposition: form-data; name=f%d\r\nContent-Transfer-Encoding: base64",
    b"content-disposition:form-data;name=\"f%d\";filename*=UTF-8''%%e2%%82",
    b'Content-Disposition: form-data; name="f%d"\r\nContent-Type: multipart/mixed; boundary=c',
    b"X-Other: %d",
)
EXTRA_HEADERS = (
    b"Expect: 100-continue",
    b"Connection: close",
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk",
    b"Upgrade: websocket",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip, chunked",
    b"Content-Encoding: gzip",
    b"Content-Length: 5",
    b"Content-Length: -1",
    b"Content-Length: 99999999999999999999",
    b"X-Request-ID: \xff\x01",
    b"Authorization: Bearer",
    b"Host: other",
    b"Inference-Header-Content-Length: 10",
    b"Inference-Header-Content-Length: x",
    b"X-Long: " + b"a" * 40_000,
    b"\r\n".join(b"X-%d: a" % i for i in range(120)),
    b" folded",
    b"no colon",
    b"Origin: http://elsewhere.example",
    b"Origin: http://allowed.example\r\nAccess-Control-Request-Method: POST",
    b"Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate",
    b"Authorization: Bearer " + KEY.encode(),
    b"X-API-Key: \xff",
    b"Traceparent: 00-" + b"f" * 32 + b"-" + b"f" * 16 + b"-01",
    b"Range: bytes=5-1",
)
METHODS = (b"POST", b"POST", b"POST", b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"X")
TEXTS = ("red", "violet", "", " ", "<b>&\0", "\ud800", "a" * 10_000, "\u202e", None, 5, [], {})
# Each kind of body, and a path that reads it.
BODY_PATHS = (
    b"/predict",
    b"/predict",
    b"/v2/models/colours/infer",
    b"/feedback",
    b"/v2/models/colours/infer",
    b"/predict",
    b"/label/labels",
)


class RequestWriter:
    """Writes random requests from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.seeds = write_seed_images()

    def write(self) -> bytes:
        """Return the bytes of one to five requests of one connection, perhaps cut off."""
        data = b"".join(self.write_request() for _ in range(self.rng.choice((1, 1, 1, 2, 5))))
        if self.rng.random() < 0.1:
            data = data[: self.rng.randint(0, len(data))]
        return data

    def write_request(self) -> bytes:
        rng = self.rng
        method = rng.choice(METHODS)
        kind = rng.randrange(len(BODY_PATHS))
        path = BODY_PATHS[kind] if rng.random() < 0.5 else rng.choice(PATHS)
        content_type, body = self.write_body(kind)
        lines = [b"%b %b HTTP/1.1" % (method, path), b"Host: x", b"Content-Type: " + content_type]
        if rng.random() < KEY_SHARE:
            lines.append(b"X-API-Key: " + KEY.encode())
        lines += rng.sample(EXTRA_HEADERS, rng.choice((0, 0, 0, 1, 2)))

        if rng.random() < 0.2:
            lines.append(b"Transfer-Encoding: chunked")
            body = self.write_chunks(body)
        else:
            lines.append(b"Content-Length: %d" % len(body))
        head = b"\r\n".join(lines) + b"\r\n\r\n"
        if rng.random() < 0.2:
            head = damage_bytes(head, rng)
        return head + body

    def write_chunks(self, body: bytes) -> bytes:
        """Return the body in chunks, with extensions and trailers."""
        cut = self.rng.randint(0, len(body))
        parts = []
        for piece in (body[:cut], body[cut:]):
            if piece:
                parts.append(b"%x;name=value\r\n%b\r\n" % (len(piece), piece))
        chunked = b"".join(parts) + b"0\r\nX-Trailer: a\r\nContent-Length: 3\r\n\r\n"
        return damage_bytes(chunked, self.rng) if self.rng.random() < 0.3 else chunked

    def write_image(self) -> bytes:
        file_format = self.rng.choice(list(FORMATS))
        seeds = self.seeds[file_format]
        if self.rng.random() < 0.5:
            return self.rng.choice(seeds)
        return mutate_image(file_format, seeds, self.rng)

    def write_body(self, kind: int) -> tuple[bytes, bytes]:
        """Return a content type and a body for the path BODY_PATHS[kind]."""
        if kind == 0:
            return self.write_form()
        if kind == 1:
            images = [self.write_base64() for _ in range(self.rng.randint(0, 4))]
            return b"application/json", self.damage_text({"images": images})
        if kind == 2:
            return b"application/json", self.damage_text(self.write_open_inference())
        if kind == 3:
            return b"application/json", self.damage_text(self.write_feedback())
        if kind == 4:
            image = self.write_image()
            inputs = self.write_open_inference(len(image) + 4)
            head = json.dumps(inputs).encode()
            return b"application/octet-stream", head + len(image).to_bytes(4, "little") + image
        if kind == 6:
            return b"application/json", self.damage_text(self.write_labels())
        return b"image/png", self.write_image()

    def write_feedback(self) -> dict[str, object]:
        """Return the JSON of a label for an answer."""
        return {
            "id": self.rng.choice(("x", *TEXTS)),
            "label": self.rng.choice(TEXTS),
            "image": self.rng.choice((0, -1, 1e9, 65_536, True, None)),
        }

    def write_labels(self) -> dict[str, object]:
        """Return the JSON of labels that the labelling page saves."""
        labels: list[object] = []
        for _ in range(self.rng.randint(1, 4)):
            image = self.rng.choice(self.seeds["bmp"])
            digest = hashlib.sha256(image).hexdigest()
            label = {
                "id": self.rng.choice((digest, "../x", *TEXTS)),
                "verdict": self.rng.choice((*Verdict, "x", None, [])),
                "label": self.rng.choice(TEXTS),
                "who": self.rng.choice(("ann", "ann", *TEXTS)),
            }
            labels.append(self.rng.choice((label, label, label, 5)))
        return {"page": self.rng.choice((PAGE_VERSION, PAGE_VERSION, "old")), "labels": labels}

    def write_form(self) -> tuple[bytes, bytes]:
        """Return a multipart body with one to four images."""
        parts = []
        for i in range(self.rng.randint(1, 4)):
            head = b"--b\r\n" + self.rng.choice(PART_HEADS) % i + b"\r\n\r\n"
            if self.rng.random() < 0.3:
                head = damage_bytes(head, self.rng)
            image = self.write_image()
            if b"base64" in head:
                image = base64.encodebytes(image)
            parts.append(head + image + b"\r\n")
        end = self.rng.choice((b"--b--\r\n", b"--b--", b"--b", b""))
        return b"multipart/form-data; boundary=b", b"".join(parts) + end

    def write_base64(self) -> object:
        text = base64.b64encode(self.write_image()).decode()
        return self.rng.choice((text, text[:-1], "data:image/png;base64," + text, "%", None, 5, []))

    def write_open_inference(self, binary_bytes: int | None = None) -> dict[str, object]:
        """Return the JSON of an inference request; `binary_bytes` follow it."""
        tensor: dict[str, object] = {
            "name": self.rng.choice(("image", "x")),
            "datatype": self.rng.choice(("BYTES", "UINT8", "FP32", "x", None, 8)),
            "shape": self.rng.choice(
                (
                    [1],
                    [1, 1],
                    [-1],
                    [True],
                    [1.5],
                    [10**30],
                    [],
                    "x",
                    [1, 32, 32, 3],
                    [2, 32, 32, 3],
                )
            ),
        }
        if binary_bytes is None:
            tensor["data"] = self.rng.choice(([self.write_base64()], [[1, 2], [3]], [], "x", None))
        else:
            tensor["parameters"] = {"binary_data_size": self.rng.choice((binary_bytes, -1, 10**30))}
        outputs: list[object] = []
        for name in self.rng.sample(("probabilities", "energy", "label", "cam", "embedding", 3), 2):
            parameters = self.rng.choice(
                (
                    {},
                    {"binary_data": True},
                    {"classification": self.rng.choice((2, -1, 10**30, "x"))},
                    {"shared_memory_region": "x"},
                    5,
                )
            )
            outputs.append({"name": name, "parameters": parameters})
        return {
            "id": self.rng.choice(("x", *TEXTS)),
            "inputs": [tensor],
            "outputs": self.rng.choice((None, [], outputs, outputs, "x")),
        }

    def damage_text(self, content: object) -> bytes:
        """Return the JSON of the content, sometimes damaged or deeply nested."""
        data = json.dumps(content).encode()
        choice = self.rng.random()
        if choice < 0.3:
            return damage_bytes(data, self.rng)
        if choice < 0.35:
            return b"[" * 100_000
        return data


class Clients:
    """Threads that send requests until the time is over."""

    def __init__(self, server: Server, findings: Path, seed: int) -> None:
        self.server = server
        self.findings_directory = findings
        self.seed = seed
        self.lock = threading.Lock()
        self.requests = 0
        self.statuses: Counter[int] = Counter()
        self.findings: Counter[str] = Counter()

    def run(self, count: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        threads = []
        for _ in range(count):
            writer = RequestWriter(self.seed)
            self.seed += 1
            threads.append(threading.Thread(target=self.send_requests, args=(writer, end)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def send_requests(self, writer: RequestWriter, end: float) -> None:
        while time.monotonic() < end:
            data = writer.write()
            half_close = writer.rng.random() < 0.5
            try:
                answer = exchange(self.server.port, data, half_close)
            except TimeoutError:
                self.keep("no answer", data)
                continue
            statuses = [int(status) for status in STATUS_LINE.findall(answer)]
            with self.lock:
                self.requests += 1
                self.statuses.update(statuses)
            for status in statuses:
                if status >= 500:
                    self.keep(f"status {status}", data)

    def keep(self, cause: str, data: bytes) -> None:
        """Count a finding and write what was sent into a file."""
        with self.lock:
            self.findings[cause] += 1
            number = sum(self.findings.values())
        self.findings_directory.mkdir(parents=True, exist_ok=True)
        (self.findings_directory / f"{number}-{cause.replace(' ', '-')}").write_bytes(data)


def exchange(port: int, data: bytes, half_close: bool) -> bytes:
    """Send the bytes and return all that arrives until the server closes the connection.

    `half_close` ends the sending side first, as clients do that send one request.
    """
    answer = b""
    connection = socket.create_connection(("127.0.0.1", port), timeout=READ_TIMEOUT_SECONDS)
    with connection, contextlib.suppress(ConnectionError):
        connection.sendall(data)
        if half_close:
            with contextlib.suppress(OSError):  # the server has closed already
                connection.shutdown(socket.SHUT_WR)
        while received := connection.recv(1 << 16):
            answer += received
    return answer


def find_bad_log_lines(log: Path) -> Counter[str]:
    """Count lines that are no JSON, and errors by the last line of what they say."""
    bad: Counter[str] = Counter()
    for line in log.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
            level = entry["level"]
        except (ValueError, KeyError, TypeError):
            bad[f"log line: {line[:80]}"] += 1
            continue
        if level in ("error", "critical"):
            text = entry.get("exception") or entry["message"]
            bad[f"log error: {text.strip().splitlines()[-1][:200]}"] += 1
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("artifacts/fuzz-requests"))
    parser.add_argument("--out", type=Path, help="file for the report")
    arguments = parser.parse_args()

    with TemporaryDirectory() as directory:
        store = Path(directory) / "store"
        log = Path(directory) / "log"
        tiny_bundle.publish(store)
        flags = ["--keep-alive-seconds", "1", "--read-timeout-seconds", "1", "--api-key", KEY]
        flags += ["--keep", str(Path(directory) / "kept"), "--keep-share", "1"]
        flags += ["--cors-origins", "http://allowed.example"]
        with Server(store, log, *flags, env={"IMAGO_LOG_FORMAT": "json"}) as server:
            server.wait_ready()
            processes = sorted(server.children())
            clients = Clients(server, arguments.findings, arguments.seed)

            clients.run(arguments.clients, WARM_UP_SECONDS)
            memory_before = read_usage(server).memory_mb
            clients.run(arguments.clients, 60 * arguments.minutes)
            memory_after = read_usage(server).memory_mb

            if sorted(server.children()) != processes:
                clients.findings["a process ended"] += 1
            plain = server.predict(sample_images.make_png(0, 0), **{"X-API-Key": KEY})
            if plain.status_code != 200:
                clients.findings["no answer to a plain request"] += 1
            if memory_after - memory_before > MAX_GROWTH_MB:
                clients.findings["memory"] += 1
        clients.findings.update(find_bad_log_lines(log))

    report = {
        **describe_run(),
        "minutes": arguments.minutes,
        "seed": arguments.seed,
        "connections": clients.requests,
        "statuses": {str(status): count for status, count in sorted(clients.statuses.items())},
        "memory_mb": [round(memory_before, 1), round(memory_after, 1)],
        "violations": dict(clients.findings),
    }
    return print_report(report, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
