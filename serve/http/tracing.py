"""OpenTelemetry traces, an optional extra: one span per request, with child spans for its steps.

The steps are the wait in the queue, decoding and inference. OpenTelemetry's own OTEL_* variables
set the endpoint, the sampling and the service's name. Runs in HTTP processes.
"""

import re
import time
from typing import TYPE_CHECKING

from serve.http.responses import CLIENT_CLOSED_REQUEST, Request, Response

if TYPE_CHECKING:  # the extra may not be installed
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

_DURATIONS = re.compile(rb"(\w+);dur=([\d.]+)")


def check_installed() -> None:
    """Raise ValueError if the extra is missing. Called before the service starts processes."""
    try:
        # The exporter imports all other packages of the extra.
        import opentelemetry.exporter.otlp.proto.http.trace_exporter  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "--tracing needs the extra of this name: pip install 'imago[tracing]'"
        ) from error


class Tracing:
    """Records the requests of one HTTP process."""

    def __init__(self) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.trace = trace
        self.propagator = TraceContextTextMapPropagator()
        self.provider = _build_provider()
        self.tracer = self.provider.get_tracer("imago")

    def record(self, request: Request, response: Response | None, seconds: float) -> None:
        """Record a request that has just ended; `response` is None if the client disconnected.

        The request's `traceparent` header (W3C Trace Context) names the parent of the span.
        """
        end_ns = time.time_ns()
        carrier: dict[str, str] = {}
        if b"traceparent" in request.headers:
            carrier["traceparent"] = request.headers[b"traceparent"].decode("latin-1")

        status = response.status if response else CLIENT_CLOSED_REQUEST
        span = self.tracer.start_span(
            f"{request.scope['method']} {request.scope['path']}",
            self.propagator.extract(carrier),
            self.trace.SpanKind.SERVER,
            start_time=end_ns - int(seconds * 1e9),
            attributes={
                "http.request.method": request.scope["method"],
                "url.path": request.scope["path"],
                "http.response.status_code": status,
                "imago.request_id": request.id,
            },
        )
        if status >= 500:
            span.set_status(self.trace.Status(self.trace.StatusCode.ERROR))

        headers = dict(response.headers) if response else {}
        if b"x-model-version" in headers:
            span.set_attribute("imago.model_version", headers[b"x-model-version"].decode())
        self._record_steps(span, end_ns, headers.get(b"server-timing", b""))
        span.end(end_ns)

    def _record_steps(self, parent: "Span", end_ns: int, server_timing: bytes) -> None:
        """Add child spans from a Server-Timing header, in milliseconds.

        The header has durations only. The last step ends with the request, each other with the
        start of the next.
        """
        context = self.trace.set_span_in_context(parent)
        for name, milliseconds in reversed(_DURATIONS.findall(server_timing)):
            start_ns = end_ns - int(float(milliseconds) * 1e6)
            self.tracer.start_span(name.decode(), context, start_time=start_ns).end(end_ns)
            end_ns = start_ns

    def close(self) -> None:
        """Send the spans that are still in the buffer."""
        self.provider.shutdown()


def _build_provider() -> "TracerProvider":
    """Return a provider that sends spans in batches, from a thread, by OTLP over HTTP."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({SERVICE_NAME: "imago"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
