"""The console script `imago`: `imago train …`, `imago serve …`, `imago models …`.

It hands the arguments to the package of that name, as `python -m train …` does. A package is
imported only for its own command: the serving image has no `train`, and neither side imports the
other.
"""

import importlib
import sys

PACKAGES = {
    "train": "train a model and publish a bundle: imago train run DATA",
    "serve": "serve a bundle over HTTP: imago serve --model NAME",
    "models": "list, check and move bundles: imago models list",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status; 2 for a command that does not exist."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0

    command, *rest = arguments
    if command not in PACKAGES:
        known = ", ".join(PACKAGES)
        print(f"error: imago has no command {command!r}; it has {known}", file=sys.stderr)
        return 2

    try:
        module = importlib.import_module(f"{command}.__main__")
    except ModuleNotFoundError as error:
        print(
            f"error: {error.name} is not installed; imago {command} needs it: "
            f"pip install 'imago[{command}]'",
            file=sys.stderr,
        )
        return 2
    status: int = module.main(rest)
    return status


def usage() -> str:
    """Return the help text: one line a command."""
    lines = ["usage: imago COMMAND …", "", "Each command has its own --help.", ""]
    lines += [f"  {name:8}{purpose}" for name, purpose in PACKAGES.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
