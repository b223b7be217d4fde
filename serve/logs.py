"""Structured logs on stderr, one line a record, as JSON or text. Image bytes never get here."""

import json
import logging
import sys
from datetime import UTC, datetime

from serve.settings import Settings

logger = logging.getLogger("imago")


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what `extra={"fields": {...}}` holds becomes keys of it."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(
            f"{key}={_plain(str(value))}" for key, value in getattr(record, "fields", {}).items()
        )
        return f"{super().format(record)} {fields}".rstrip()


def _plain(text: str) -> str:
    """As it is or, where it could pass for another field or line, in quotes: a path comes from whoever sends it."""
    return text if text.isprintable() and not set(text) & set(' "=') else json.dumps(text)


def configure(settings: Settings) -> None:
    """Send every record of this process to stderr, those of libraries from warnings up."""
    handler = logging.StreamHandler(sys.stderr)
    text = TextFormatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else text)
    logging.root.handlers = [handler]
    logging.root.setLevel(logging.WARNING)
    logger.setLevel(settings.log_level.upper())
    for name in ("litserve", "uvicorn", "uvicorn.error", "uvicorn.access"):
        library = logging.getLogger(name)
        library.handlers, library.propagate = [], True
        library.setLevel(logging.ERROR)  # uvicorn warns of every malformed request
