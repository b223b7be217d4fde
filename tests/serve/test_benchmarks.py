"""The open-loop client of the benchmarks, and the page of their results."""

import json
import os
import shutil
import socketserver
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from models.store import Store
from support import ROOT, tiny_bundle

sys.path.insert(0, str(ROOT / "tests/benchmarks"))

from open_loop import OpenLoopClient, draw_arrivals, find_chunks_end
from serve_rivals import RIVALS, check_answer, prepare_rivals, start_rival

RATE = 100
SECONDS = 0.4
STALL_SECONDS = 0.3
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1;x=y\r\n}\r\n0\r\n\r\n"


class StallingHandler(socketserver.StreamRequestHandler):
    """Answers nothing for STALL_SECONDS after the server's first request."""

    def handle(self) -> None:
        while self.rfile.readline():
            length = 0
            while (line := self.rfile.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            self.rfile.read(length)
            if self.server.closes_connections:
                return
            self.server.first_requests.append(time.monotonic())
            answer_at = self.server.first_requests[0] + STALL_SECONDS
            time.sleep(max(answer_at - time.monotonic(), 0))
            self.wfile.write(self.server.answer)


@contextmanager
def stalling_server(closes_connections: bool = False, answer: bytes = ANSWER) -> Iterator[int]:
    """A server with a thread for each connection; yields its port."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), StallingHandler) as server:
        server.first_requests = []
        server.closes_connections = closes_connections
        server.answer = answer
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("answer", [ANSWER, CHUNKS], ids=["length", "chunks"])
def test_latency_counts_from_when_a_request_was_due(answer: bytes):
    """A client that waits for answers would see one slow request, and send few meanwhile."""
    with stalling_server(answer=answer) as port:
        result = OpenLoopClient(port, b"image").run(RATE, SECONDS)
    due = len(list(draw_arrivals(RATE, SECONDS, "constant")))
    assert result.offered == due
    assert result.statuses == {200: due}
    assert result.lost == 0
    due_while_stalled = int(RATE * STALL_SECONDS / 2)
    slow = [latency for latency in result.latencies if latency > STALL_SECONDS / 2 - 0.02]
    assert len(slow) >= due_while_stalled - 1
    assert result.latency_ms(0.99) >= 1e3 * (STALL_SECONDS - 0.02)


def test_the_end_of_a_body_in_chunks_is_found():
    body = CHUNKS.partition(b"\r\n\r\n")[2]
    assert find_chunks_end(bytearray(body + b"HTTP/1.1"), 0) == len(body)
    for length in range(len(body)):
        assert find_chunks_end(bytearray(body[:length]), 0) > length


def test_a_request_without_an_answer_is_lost():
    with stalling_server(closes_connections=True) as port:
        result = OpenLoopClient(port, b"image").run(RATE, 0.1)
    assert result.offered == result.lost
    with pytest.raises(ValueError, match="no request was answered"):
        result.latency_ms(0.5)


def test_arrivals_have_the_rate():
    constant = list(draw_arrivals(50, 10, "constant"))
    assert len(constant) == pytest.approx(500, abs=1)
    random = list(draw_arrivals(50, 100, "poisson"))
    assert len(random) == pytest.approx(5000, rel=0.05)
    assert random == sorted(random)
    assert random == list(draw_arrivals(50, 100, "poisson"))


WRITE_TWO_RESULTS = """
import sys
sys.path.insert(0, sys.argv[1])
from results import write_result
for service in (100.0, 200.0):
    write_result("serve_speed.py", {"case": "small-int8", "service": service}, ("case",))
write_result("serve_speed.py", {"case": "tiny", "service": 900.0}, ("case",))
"""


def test_results_are_kept_once_for_each_case_and_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    benchmarks = ROOT / "tests/benchmarks"
    environment = os.environ | {"BENCHMARK_RESULTS": str(tmp_path)}
    command = [sys.executable, "-c", WRITE_TWO_RESULTS, str(benchmarks)]
    subprocess.run(command, env=environment, check=True)

    small, tiny = json.loads((tmp_path / "serve_speed.json").read_text())
    assert (small["case"], small["service"]) == ("small-int8", 200.0)
    assert tiny["machine"]["cores"] >= 1
    assert tiny["versions"].keys() >= {"python", "imago", "numpy"}

    bench = [sys.executable, str(benchmarks / "bench.py"), "--page"]
    subprocess.run(bench, env=environment, check=True)
    page = (tmp_path / "RESULTS.md").read_text()
    assert "| small-int8 | service 200 |" in page
    assert "| tiny | service 900 |" in page
    assert "small-int8" in (tmp_path / "plots/serve_speed.svg").read_text()


def test_another_server_answers_as_onnxruntime_does(bundle_store: Path):
    """FastAPI is there in any case; the script checks the others when it installs them."""
    bundle = Store(bundle_store).path("colours")
    files = (bundle / "model.onnx", bundle / "manifest.json")
    with ExitStack() as stack:
        server = start_rival(stack, "fastapi", sys.executable, *files)
        for label in tiny_bundle.CLASSES:
            check_answer("fastapi", server, tiny_bundle.make_image(label), *files)
        with pytest.raises(urllib.error.HTTPError):
            check_answer("fastapi", server, b"no image", *files)


def test_servers_that_are_not_installed_are_left_out_with_a_line(tmp_path: Path, capsys):
    assert prepare_rivals(["mlserver", "fastapi"], None) == {"fastapi": sys.executable}
    assert "mlserver left out: name a folder" in capsys.readouterr().out

    (tmp_path / "file").touch()
    assert prepare_rivals(["bentoml"], tmp_path / "file") == {}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("bentoml left out: ")


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("litserve", {"label": 3, "confidence": 0.5}),
        ("ray", {"label": 3, "confidence": 0.5}),
        ("bentoml", [{"label": 3, "confidence": 0.5}]),
        ("mlserver", {"outputs": [{"name": "label", "data": [3]}]}),
    ],
)
def test_requests_and_answers_of_other_servers(kind: str, answer: object):
    rival = RIVALS[kind]
    body = rival.build_body(b"image")
    is_json = rival.content_type == "application/json"
    assert (b"aW1hZ2U=" if is_json else b"image") in body
    assert rival.read_label(answer) == 3


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed")
def test_serve_predict_is_measured_beside_the_service(tmp_path: Path):
    environment = os.environ | {"BENCHMARK_RESULTS": str(tmp_path)}
    script = ROOT / "tests/benchmarks/predict_speed.py"
    sizes = ("small", "--rounds", "1", "--seconds", "1", "--images", "200", "--keep")
    subprocess.run([sys.executable, str(script), *sizes], env=environment, check=True)
    (result,) = json.loads((tmp_path / "predict_speed.json").read_text())
    assert result["case"] == "small"
    assert result["predict"] / result["service"] == pytest.approx(result["ratio"], rel=0.1)
