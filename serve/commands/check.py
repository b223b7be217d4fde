"""`imago serve check`: show what would be served with these settings, and whether it is ready.

It loads the model as a worker does. Workers also run this command, in a separate process, before
they load a new version.
"""

import argparse
import json
import sys
from collections.abc import Callable

from models.bundle import read_manifest
from models.cpu_quota import available_cores
from models.store import LATEST
from serve import options
from serve.bundle_source import BundleSource
from serve.model import Model
from serve.settings import Settings
from serve.worker.exit_status import STORE_UNREADABLE
from serve.worker.version_check import is_transient

DESCRIPTION = "Show what would be served with these settings, and whether it is ready."
STATUS_HELP = (
    "Exit status: 0 ready, 1 not ready, 2 invalid setting, 75 the store can't be read now."
)
MAX_CLASSES_SHOWN = 10

# Shows one line: a name and its value.
ShowLine = Callable[[str, str], None]


def main(arguments: list[str]) -> int:
    """Run the command and return its exit status, as STATUS_HELP says."""
    parser = argparse.ArgumentParser(
        "imago serve check", description=DESCRIPTION, epilog=STATUS_HELP
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    options.add_arguments(parser)
    flags = vars(parser.parse_args(arguments))
    as_json = flags.pop("json")
    settings = options.parse_settings(flags)

    show_line = _show_nothing if as_json else _print_line
    try:
        model = load_model(settings, show_line)
    except (ValueError, OSError) as error:
        show_line("ready", "no")
        print(f"error: {error}", file=sys.stderr)
        return STORE_UNREADABLE if is_transient(error) else 1

    if as_json:
        print(json.dumps(summarize(model)))
    else:
        show_manifest(model, show_line)
        show_line("ready", "yes")
    return 0


def load_model(settings: Settings, show_line: ShowLine) -> Model:
    """Load the model as a worker does, and show each step.

    Raises ValueError, of which BundleError is a kind, or OSError.
    """
    threads = settings.threads or max(1, available_cores() // settings.workers)
    workers = "1 worker" if settings.workers == 1 else f"{settings.workers} workers"
    show_line("cores", f"{threads} for each of {workers}")

    settings.load_api_key()
    options.resolve_model(settings)
    source = BundleSource(settings)
    path = source.path(settings.version)
    versions = ", ".join(map(str, source.versions())) or "unknown"
    follows_latest = settings.version == LATEST and settings.reload_seconds > 0
    version = read_manifest(path).version if settings.bundle else path.resolve().name
    show_line(
        "model",
        f"{settings.model}, version {version} of {versions}"
        f"{', follows latest' if follows_latest else ''}",
    )

    if not source.is_reachable:
        show_line("store", f"out of reach, so this is the copy in {path}")

    bundle = source.open(settings.version)
    show_line("checksums", "all files match")
    if bundle.public_key:
        show_line("signature", "by the given key")

    model = Model(bundle, settings, threads)
    variants = ", ".join(bundle.manifest.variants)
    show_line("variant", f"{model.variant} of {variants}, on {model.engine.name}")
    show_line("samples", f"{len(bundle.manifest.samples)} reproduced")
    return model


def show_manifest(model: Model, show_line: ShowLine) -> None:
    """Show the input, the classes and the calibration of a model."""
    manifest = model.manifest
    spec = manifest.input
    show_line("input", f"{spec.width}x{spec.height}, {spec.resize}")

    names = ", ".join(manifest.classes[:MAX_CLASSES_SHOWN])
    ellipsis = ", …" if len(manifest.classes) > MAX_CLASSES_SHOWN else ""
    show_line("classes", f"{len(manifest.classes)}: {names}{ellipsis}")

    calibration = model.calibration
    if calibration.always_abstains:
        show_line("abstains", "on every image: no threshold is accurate enough")
    elif calibration.abstain_threshold:
        show_line("abstains below", f"confidence {calibration.abstain_threshold:.3g}")
    else:
        show_line("abstains", "never")
    if calibration.conformal_level is None:
        show_line("prediction sets", "none")
    else:
        level = f"{calibration.conformal_level:.0%}"
        show_line("prediction sets", f"contain the true class in {level} of cases")


def summarize(model: Model) -> dict[str, str | int]:
    """Return what --json prints."""
    return {
        "model": model.name,
        "version": model.version,
        "variant": model.variant,
        "engine": model.engine.name,
        "digest": model.digest,
    }


def _print_line(name: str, value: str) -> None:
    print(f"{name:16} {value}", flush=True)


def _show_nothing(name: str, value: str) -> None:
    pass
