"""`python -m serve` and `imago serve`: the prediction service and its commands.

Without a command it starts the service and becomes its supervisor. Heavy modules are imported only
when they are needed, so that `--help` and errors appear quickly.
"""

import argparse
import importlib
import io
import logging
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

DESCRIPTION = """Serve a model over HTTP. Each setting is a flag and an environment variable.

Commands, each with its own --help:
  predict   classify image files without a server
  check     show what would be served, and whether it is ready
  kept      show the images that a service kept, or delete those of a request
  label     label them on a page in the browser
"""
COMMANDS = ("predict", "check", "kept", "label")

# Exit statuses, as a shell reports them: 128 plus the number of the signal.
STATUS_SIGINT = 130
STATUS_SIGPIPE = 141
STATUS_SIGTERM = 143


def main(arguments: list[str]) -> int:
    """Serve, or run a command, and return the exit status.

    The status is 2 for an invalid setting, bundle or store.
    """
    _handle_sigterm_as_init()
    from models.bundle import BundleError

    is_command = bool(arguments) and arguments[0] in COMMANDS
    try:
        if is_command:
            return run_command(arguments[0], arguments[1:])
        return run_service(arguments)
    except (ValueError, BundleError) as error:
        _print_error(str(error), as_json=not is_command and _is_json_demanded(arguments))
        return 2


def run_service(arguments: list[str]) -> int:
    """Check what can be checked before processes start, then serve until SIGTERM."""
    from serve import options
    from serve.http import tracing
    from serve.processes.ports import ANY_PORT, is_port_free

    parser = _ServiceParser(
        "imago serve",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.is_json = _is_json_demanded(arguments)
    options.add_arguments(parser)
    flags = vars(parser.parse_args(arguments))
    settings = options.resolve_model_apart(options.parse_settings(flags))

    settings.load_api_key()
    if not is_port_free(settings.host, ANY_PORT):
        raise ValueError(
            f"--host (IMAGO_HOST): this machine has no address of the kind {settings.host}"
        )
    if settings.tracing:
        tracing.check_installed()

    from serve.processes.supervisor import serve

    return serve(settings)


def run_command(name: str, arguments: list[str]) -> int:
    """Run a command and return its exit status.

    SIGINT and a closed pipe end the process at once, without waiting for threads: one of them may
    be reading from a pipe that never ends.
    """
    # A file name may contain bytes that are not valid text.
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(errors="backslashreplace")

    command = importlib.import_module(f"serve.commands.{name}")
    try:
        try:
            status: int = command.main(arguments)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        os._exit(STATUS_SIGINT)
    except BrokenPipeError:
        os._exit(STATUS_SIGPIPE)
    return status


class _ServiceParser(argparse.ArgumentParser):
    """A parser that leaves its errors to `main` where the log is demanded as JSON."""

    is_json = False

    def error(self, message: str) -> NoReturn:
        """Print usage and message and exit with status 2, or raise ValueError."""
        if self.is_json:
            raise ValueError(message)
        super().error(message)


def _is_json_demanded(arguments: list[str]) -> bool:
    """Whether a flag or variable sets the format of the log to JSON.

    The default does not count: without a setting, errors at the start are text for a person.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--log-format", nargs="?", default=os.environ.get("IMAGO_LOG_FORMAT"))
    known, _ = parser.parse_known_args(arguments)
    return known.log_format == "json"


def _print_error(message: str, as_json: bool) -> None:
    """Print the error on stderr: one line, or a record like those of the log."""
    if not as_json:
        print(f"error: {message}", file=sys.stderr)
        return

    from serve.logs import JsonFormatter

    record = logging.LogRecord("imago", logging.ERROR, "", 0, message, None, None)
    print(JsonFormatter().format(record), file=sys.stderr)


def _handle_sigterm_as_init() -> None:
    """Let SIGTERM end the process during imports if it is the first of a container.

    The kernel ignores signals to process 1 that have no handler. The supervisor sets other handlers
    later.
    """
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, _exit_on_sigterm)


def _exit_on_sigterm(number: int, frame: FrameType | None) -> None:
    os._exit(STATUS_SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
