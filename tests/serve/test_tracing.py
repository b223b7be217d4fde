"""OpenTelemetry: spans of real requests, received over OTLP by a collector in the test."""

import gzip
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from support import tiny_bundle

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")


@pytest.fixture
def collector():
    """The URL of an OTLP endpoint, and the list of the spans that it received."""
    spans = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            request = trace_service.ExportTraceServiceRequest.FromString(body)
            for resource in request.resource_spans:
                names = {a.key: a.value.string_value for a in resource.resource.attributes}
                assert names["service.name"] == "imago"
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", spans
    server.shutdown()
    server.server_close()


def test_spans_of_requests(start, collector):
    url, spans = collector
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    service = start("--tracing", "true", env=env)
    parent = "0af7651916cd43dd8448eb211c80319c"
    answer = service.predict(
        tiny_bundle.make_image("red"), traceparent=f"00-{parent}-b7ad6b7169203331-01"
    )
    service.predict(b"no image")
    end = time.monotonic() + 30
    while sum(s.name == "POST /predict" for s in spans) < 2:
        assert time.monotonic() < end, "no spans came"
        time.sleep(0.05)
    good, bad = (s for s in spans if s.name == "POST /predict")
    attributes = {a.key: a.value.string_value or a.value.int_value for a in good.attributes}
    assert good.trace_id.hex() == parent
    assert good.parent_span_id.hex() == "b7ad6b7169203331"
    assert attributes["http.response.status_code"] == 200
    assert attributes["imago.request_id"] == answer.json()["id"]
    assert attributes["imago.model_version"] == "1"
    parts = {s.name: s for s in spans if s.parent_span_id == good.span_id}
    assert set(parts) == {"queue", "decode", "infer"}
    for part in parts.values():
        assert good.start_time_unix_nano <= part.start_time_unix_nano <= part.end_time_unix_nano
        assert part.end_time_unix_nano <= good.end_time_unix_nano
    assert {a.key: a.value.int_value for a in bad.attributes}["http.response.status_code"] == 415


def test_buffered_spans_are_sent_at_shutdown(start, collector):
    url, spans = collector
    service = start(
        "--tracing",
        "true",
        env={"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "60000"},
    )
    service.predict(tiny_bundle.make_image("red"))
    assert not spans
    assert service.stop() == 0
    assert "POST /predict" in [span.name for span in spans]
