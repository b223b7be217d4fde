"""Say what would be served with these settings, and why it is or isn't ready. Exit status 0 means ready."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from models.bundle import Bundle
from models.cpu_quota import available_cores
from models.store import LATEST, Store
from serve import options
from serve.model import Model
from serve.settings import Settings
from serve.worker.exit_status import STORE_UNREADABLE
from serve.worker.version_check import is_transient


def main(arguments: list[str]) -> int:
    """0: ready, 1: not ready, 2: bad usage, 75: the store can't be read now."""
    parser = argparse.ArgumentParser("python -m serve check", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    options.add(parser)
    given = vars(parser.parse_args(arguments))
    as_json = given.pop("json")
    say: Callable[[str, Any], None] = (lambda *_: None) if as_json else tell
    settings = options.read(given)
    try:
        model = check(settings, say)
    except (ValueError, OSError) as error:
        say("ready", "no")
        print(f"error: {error}", file=sys.stderr)
        return STORE_UNREADABLE if is_transient(error) else 1
    if as_json:
        print(
            json.dumps(
                {
                    "model": model.name,
                    "version": model.version,
                    "variant": model.variant,
                    "engine": model.engine.name,
                    "digest": model.bundle.digest,
                }
            )
        )
    calibration = model.manifest.calibration
    say(
        "input",
        f"{model.manifest.input.width}x{model.manifest.input.height}, {model.manifest.input.resize}",
    )
    say(
        "classes",
        f"{len(model.manifest.classes)}: {', '.join(model.manifest.classes[:10])}"
        f"{', …' if len(model.manifest.classes) > 10 else ''}",
    )
    say("abstains below", f"confidence {calibration.abstain_threshold:.3g}")
    say(
        "prediction sets",
        "none"
        if calibration.conformal_level is None
        else f"hold the true class in {calibration.conformal_level:.0%} of cases",
    )
    say("ready", "yes")
    return 0


def check(settings: Settings, say: Callable[[str, Any], None]) -> Model:
    """Everything that a starting worker does. Raises ValueError (BundleError is one) with the cause."""
    threads = settings.threads or max(1, available_cores() // settings.workers)
    say(
        "cores",
        f"{threads} for each of {settings.workers} worker{'s' if settings.workers > 1 else ''}",
    )
    settings.key()
    options.resolve(settings)
    store = Store(settings.store)
    path = store.path(settings.model, settings.version)
    follows = ", follows latest" if settings.version == LATEST and settings.reload_seconds else ""
    say(
        "model",
        f"{settings.model}, version {path.resolve().name} of "
        f"{', '.join(map(str, store.versions(settings.model)))}{follows}",
    )
    bundle = Bundle(path)
    say("digests", "every file is as it was written")
    model = Model(bundle, settings, threads)
    say(
        "variant",
        f"{model.variant} of {', '.join(bundle.manifest.variants)}, on {model.engine.name}",
    )
    say("samples", f"{len(bundle.manifest.samples)} answered as expected")
    return model


def tell(name: str, value: Any) -> None:
    print(f"{name:16} {value}", flush=True)
