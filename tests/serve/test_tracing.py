"""OpenTelemetry: spans of real requests, received over OTLP by a collector in the test."""

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from support import tiny_bundle
from support.server import wait_until

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")


def read_attributes(message: Any) -> dict[str, str | int]:
    """Return the attributes of a span or a resource."""
    return {
        attribute.key: attribute.value.string_value or attribute.value.int_value
        for attribute in message.attributes
    }


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
                assert read_attributes(resource.resource)["service.name"] == "imago"
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
    server = start("--tracing", "true", env=env)
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    answer = server.predict(
        tiny_bundle.make_image("red"), traceparent=f"00-{trace_id}-b7ad6b7169203331-01"
    )
    server.predict(b"no image")

    def find_requests() -> list[Any]:
        return [span for span in spans if span.name == "POST /predict"]

    wait_until(lambda: len(find_requests()) == 2)
    answered, refused = find_requests()
    attributes = read_attributes(answered)
    assert answered.trace_id.hex() == trace_id
    assert answered.parent_span_id.hex() == "b7ad6b7169203331"
    assert attributes["http.response.status_code"] == 200
    assert attributes["imago.request_id"] == answer.json()["id"]
    assert attributes["imago.model_version"] == "1"

    steps = [span for span in spans if span.parent_span_id == answered.span_id]
    assert {step.name for step in steps} == {"queue", "decode", "infer"}
    for step in steps:
        assert answered.start_time_unix_nano <= step.start_time_unix_nano
        assert step.start_time_unix_nano <= step.end_time_unix_nano
        assert step.end_time_unix_nano <= answered.end_time_unix_nano
    assert read_attributes(refused)["http.response.status_code"] == 415


def test_buffered_spans_are_sent_at_shutdown(start, collector):
    url, spans = collector
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "60000"}
    server = start("--tracing", "true", env=env)
    server.predict(tiny_bundle.make_image("red"))
    assert not spans
    assert server.stop() == 0
    assert "POST /predict" in [span.name for span in spans]
