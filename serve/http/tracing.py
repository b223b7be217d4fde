"""OpenTelemetry traces, an optional extra: a span for each request, with its time in the queue, decoding and the graph.

Where spans go, how they are sampled and what the service is called is set by OpenTelemetry's own OTEL_* variables.
"""

import re
import time

from serve.http.responses import Request, Response

TIMES = re.compile(rb"(\w+);dur=([\d.]+)")


def check() -> None:
    """Raises ValueError where the extra is not installed. In an HTTP process it would not end the service."""
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter  # noqa: F401  # needs all the others
    except ImportError as error:
        raise ValueError(
            "--tracing needs the extra of this name: pip install 'imago[tracing]'"
        ) from error


class Tracing:
    """What one HTTP process needs for it."""

    def __init__(self):
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.trace, self.propagator = trace, TraceContextTextMapPropagator()
        self.provider = _provider()
        self.tracer = self.provider.get_tracer("imago")

    def record(self, request: Request, response: Response | None, seconds: float) -> None:
        """Spans of a request that has just ended. A `traceparent` header (W3C) makes them its children."""
        end = time.time_ns()
        carrier = (
            {"traceparent": request.headers[b"traceparent"].decode("latin-1")}
            if b"traceparent" in request.headers
            else {}
        )
        status = response.status if response else 499
        span = self.tracer.start_span(
            f"{request.scope['method']} {request.scope['path']}",
            self.propagator.extract(carrier),
            self.trace.SpanKind.SERVER,
            start_time=end - int(seconds * 1e9),
            attributes={
                "http.request.method": request.scope["method"],
                "url.path": request.scope["path"],
                "http.response.status_code": status,
                "imago.request_id": request.id,
            },
        )
        headers = dict(response.headers) if response else {}
        if b"x-model-version" in headers:
            span.set_attribute("imago.model_version", headers[b"x-model-version"].decode())
        if status >= 500:
            span.set_status(self.trace.Status(self.trace.StatusCode.ERROR))
        self.parts(span, end, headers.get(b"server-timing", b""))
        span.end(end)

    def parts(self, parent, end: int, timing: bytes) -> None:
        """Child spans from the durations [ms] of a Server-Timing header; the last part ends with the request."""
        context = self.trace.set_span_in_context(parent)
        for name, milliseconds in reversed(TIMES.findall(timing)):
            start = end - int(float(milliseconds) * 1e6)
            self.tracer.start_span(name.decode(), context, start_time=start).end(end)
            end = start

    def close(self) -> None:
        """Send what is left."""
        self.provider.shutdown()


def _provider():
    """Spans leave in batches, from a thread, by OTLP over HTTP."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(
        resource=Resource.create({SERVICE_NAME: "imago"}), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
