"""The prediction service, from settings in flags and IMAGO_ variables.

Without a command it serves. Commands: predict (classify files without a server), check (what would be served, and is it
ready), bench (a small load test of a running service). Each has its own --help.
"""
import argparse
import importlib
import sys

from models.bundle import BundleError
from serve import machine, options, tracing

COMMANDS = ("predict", "check", "bench")


def main(arguments: list[str]) -> int:
    try:
        if arguments and arguments[0] in COMMANDS:
            return importlib.import_module(f"serve.commands.{arguments[0]}").main(arguments[1:])
        parser = argparse.ArgumentParser("python -m serve", description=__doc__,
                                         formatter_class=argparse.RawDescriptionHelpFormatter)
        options.add(parser)
        chosen = options.resolve(options.read(vars(parser.parse_args(arguments))))
        chosen.key()
        if not machine.free(chosen.host):
            raise ValueError(f"--host (IMAGO_HOST): this machine has no address of the kind {chosen.host}")
        if chosen.tracing:
            tracing.check()
        from serve.supervisor import serve  # only now: LitServe takes half a second to import
        return serve(chosen)
    except (ValueError, BundleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
