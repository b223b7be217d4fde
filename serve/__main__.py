"""The prediction service, from settings in flags and IMAGO_ variables.

Without a command it serves. Commands: predict (classify files without a server), check (what would be served, and is it
ready), bench (a small load test of a running service). Each has its own --help.
"""

import argparse
import importlib
import io
import os
import signal
import sys

COMMANDS = ("predict", "check", "bench")
INTERRUPTED, UNREAD, ENDED = (
    130,
    141,
    143,
)  # exit statuses, as a shell has them for SIGINT, SIGPIPE and SIGTERM


def main(arguments: list[str]) -> int:
    if os.getpid() == 1:  # from which the kernel keeps each signal that it has no handler for
        signal.signal(signal.SIGTERM, lambda *_: os._exit(ENDED))
    from models.bundle import BundleError  # only now: all there is to import takes a second
    from serve import options
    from serve.http import tracing
    from serve.processes.ports import ANY_PORT, is_port_free

    try:
        if arguments and arguments[0] in COMMANDS:
            return run(*arguments)
        parser = argparse.ArgumentParser(
            "python -m serve",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        options.add(parser)
        chosen = options.resolve(options.read(vars(parser.parse_args(arguments))))
        chosen.key()
        if not is_port_free(chosen.host, ANY_PORT):
            raise ValueError(
                f"--host (IMAGO_HOST): this machine has no address of the kind {chosen.host}"
            )
        if chosen.tracing:
            tracing.check_installed()
        from serve.processes.supervisor import serve  # LitServe takes half of it

        return serve(chosen)
    except (ValueError, BundleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(command: str, *arguments: str) -> int:
    """A command. Ctrl-C, or a reader that has seen enough, ends it at once; a thread may be reading what never ends."""
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be any bytes
    try:
        try:
            return importlib.import_module(f"serve.commands.{command}").main(list(arguments))
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)
    except BrokenPipeError:
        os._exit(UNREAD)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
