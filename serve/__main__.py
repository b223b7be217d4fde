"""`python -m serve`: settings from flags and IMAGO_ variables, then the service."""
import argparse
import sys
from typing import Any

from pydantic import ValidationError

from models.bundle import BundleError
from models.store import Store
from serve.settings import PREFIX, Settings


def parser() -> argparse.ArgumentParser:
    """One flag for each setting; its help names the variable and the default."""
    made = argparse.ArgumentParser("python -m serve", description=__doc__,
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f", default {field.default}"
        made.add_argument(f"--{name.replace('_', '-')}", metavar=name.rpartition("_")[2].upper(),
                          default=argparse.SUPPRESS, help=f"{field.description} [{PREFIX}{name.upper()}{default}]")
    return made


def settings(flags: dict[str, Any]) -> Settings:
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
    if given.model is None:
        names = store.names()
        if len(names) != 1:
            raise BundleError(f"{given.store}: no model in this store; train one first: make train" if not names else
                              f"{given.store} has several models, choose with --model: {', '.join(names)}")
        given.model = names[0]
    store.path(given.model, given.version)
    return given


def main(arguments: list[str]) -> int:
    try:
        chosen = resolve(settings(vars(parser().parse_args(arguments))))
        chosen.key()
        from serve.supervisor import serve  # only now: LitServe takes half a second to import
        return serve(chosen)
    except (ValueError, BundleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
