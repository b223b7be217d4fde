"""Settings on a command line: a flag each, an IMAGO_ variable each, and errors of one line."""

import argparse
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from models.bundle import BundleError
from models.store import Store
from serve.settings import PREFIX, Settings

MODEL = (
    "store",
    "model",
    "version",
    "variant",
    "engine",
    "threads",
)  # what says which model runs, and how
KEY = ("api_key", "api_key_file")


def add(parser: argparse.ArgumentParser, names: Iterable[str] = Settings.model_fields) -> None:
    """One flag for each setting; its help names the variable and the default."""
    for name in names:
        field = Settings.model_fields[name]
        default = "" if field.default in (None, "") else f", default {field.default}"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            metavar=name.rpartition("_")[2].upper(),
            default=argparse.SUPPRESS,
            help=f"{field.description} [{PREFIX}{name.upper()}{default}]",
        )


def read(flags: dict[str, Any]) -> Settings:
    """Raises ValueError, in one line that names the setting."""
    try:
        return Settings(**flags)
    except ValidationError as error:
        first = error.errors()[0]
        name = "_".join(map(str, first["loc"]))
        where = f"--{name.replace('_', '-')} ({PREFIX}{name.upper()}): " if name else ""
        raise ValueError(f"{where}{first['msg'].removeprefix('Value error, ')}") from error


def resolve(given: Settings) -> Settings:
    """Name the model where the store leaves no choice. Raises BundleError where it leaves one, or has none."""
    store = Store(given.store)
    if not given.model:
        names = store.names()
        if len(names) != 1:
            raise BundleError(
                f"{given.store}: no model in this store; train one first: make train"
                if not names
                else f"{given.store} has several models, choose with --model: {', '.join(names)}"
            )
        given.model = names[0]
    store.path(given.model, given.version)
    return given
