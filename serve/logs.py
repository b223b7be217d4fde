"""Structured logs on stderr, one line per record, as JSON or text. Used by all processes.

The content of images is never logged.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from serve.settings import Settings

LIBRARY_LOGGERS = ("litserve", "uvicorn", "uvicorn.error", "uvicorn.access")

logger = logging.getLogger("imago")


class JsonFormatter(logging.Formatter):
    """One JSON object per line. The keys of `extra={"fields": {…}}` become keys of the object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON."""
        created = datetime.fromtimestamp(record.created, UTC)
        entry: dict[str, Any] = {
            "time": created.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """One line of text. The keys of `extra={"fields": {…}}` follow the message as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        parts = [super().format(record)]
        for key, value in getattr(record, "fields", {}).items():
            parts.append(f"{key}={_quote(str(value))}")
        return " ".join(parts)


def _quote(text: str) -> str:
    """Quote a value that could pass for another field or line, such as a path sent by a client."""
    if text.isprintable() and not set(text) & set(' "='):
        return text
    return json.dumps(text)


def configure(settings: Settings) -> None:
    """Send the log records of this process to stderr; of libraries, only warnings and errors."""
    handler = logging.StreamHandler(sys.stderr)
    if settings.log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(TextFormatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    logging.root.handlers = [handler]
    logging.root.setLevel(logging.WARNING)
    logger.setLevel(settings.log_level.upper())

    # uvicorn logs a warning for every malformed request, which any client can send.
    for name in LIBRARY_LOGGERS:
        library = logging.getLogger(name)
        library.handlers = []
        library.propagate = True
        library.setLevel(logging.ERROR)
