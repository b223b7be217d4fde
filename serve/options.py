"""The settings on a command line: one flag each, with errors of one line.

pydantic-settings has a command line too. It is not used for two reasons. It drops an empty value,
so that `--api-key ""` would start a service without a key. And it can neither name environment
variables in `--help` nor combine a subset of the settings with the arguments of a command.
"""

import argparse
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from models.bundle import BundleError
from models.store import Store
from serve.settings import PREFIX, Settings

# The settings that select the model and how it runs.
MODEL_SETTINGS = ("store", "model", "version", "variant", "engine", "threads")


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
    store = Store(settings.store)
    if not settings.model:
        names = store.names()
        if not names:
            raise BundleError(
                f"{settings.store}: no model in this store; train one first: make train"
            )
        if len(names) > 1:
            raise BundleError(
                f"{settings.store} has several models, choose with --model: {', '.join(names)}"
            )
        settings.model = names[0]

    store.path(settings.model, settings.version)
    return settings


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _variable(name: str) -> str:
    return f"{PREFIX}{name.upper()}"
