"""The settings on a command line: one flag each, with errors of one line.

pydantic-settings has a command line too. It is not used for two reasons. It drops an empty value,
so that `--api-key ""` would start a service without a key. And it can neither name environment
variables in `--help` nor combine a subset of the settings with the arguments of a command.
"""

import argparse
import multiprocessing
from collections.abc import Iterable
from multiprocessing import connection
from typing import Any

from pydantic import ValidationError

from models.bundle import BundleError
from serve.bundle_source import BundleSource
from serve.settings import PREFIX, Settings

# The settings that select the model and how it runs.
MODEL_SETTINGS = (
    "store",
    "bundle",
    "model",
    "version",
    "variant",
    "engine",
    "threads",
    "store_cache",
    "store_cache_bytes",
)


def add_arguments(
    parser: argparse.ArgumentParser, names: Iterable[str] = Settings.model_fields
) -> None:
    """Add a flag per setting, whose help shows the environment variable and the default."""
    for name in names:
        field = Settings.model_fields[name]
        has_default = field.default not in (None, "")
        default = f", default {field.default}" if has_default else ""
        parser.add_argument(
            _flag(name),
            metavar=name.rpartition("_")[2].upper(),
            default=argparse.SUPPRESS,
            help=f"{field.description} [{_variable(name)}{default}]",
        )


def parse_settings(flags: dict[str, Any]) -> Settings:
    """Return the settings from flags, environment variables and defaults.

    Raises ValueError with one line that names the first invalid setting.
    """
    try:
        return Settings(**flags)
    except ValidationError as error:
        details = error.errors()[0]
        message = details["msg"].removeprefix("Value error, ")
        name = "_".join(map(str, details["loc"]))
        if name:
            message = f"{_flag(name)} ({_variable(name)}): {message}"
        raise ValueError(message) from error


def resolve_model(settings: Settings) -> Settings:
    """Set the name of the model, if it is not given and the store has only one.

    Raises BundleError if the store has none or several, or not the version of the settings.
    """
    BundleSource(settings).resolve_model()
    return settings


def resolve_model_apart(settings: Settings) -> Settings:
    """Do what `resolve_model` does, such that this process may fork others that use a bucket.

    The threads that read a bucket do not survive a fork, so a child process reads it.
    """
    if not BundleSource(settings).is_bucket:
        return resolve_model(settings)

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_resolved_model, args=(settings, sender))
    child.start()
    sender.close()
    try:
        model, error = receiver.recv()
    except EOFError as failure:
        raise BundleError(f"{settings.store}: the process that reads it was killed") from failure
    finally:
        child.join()
    if error:
        raise BundleError(error)
    settings.model = model
    return settings


def _send_resolved_model(settings: Settings, sender: connection.Connection) -> None:
    """Send the name of the model and an empty text, or the error."""
    try:
        resolve_model(settings)
    except (ValueError, OSError) as error:  # BundleError is a ValueError
        sender.send(("", str(error)))
    else:
        sender.send((settings.model, ""))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _variable(name: str) -> str:
    return f"{PREFIX}{name.upper()}"
