"""The version that a worker loads when it starts.

The version that is served is recorded in the run directory. A worker that replaces another can load
it again, also while the store's latest version is a bad one.
"""

import os

from models.store import LATEST
from serve import logs
from serve.bundle_source import BundleSource
from serve.model import Model
from serve.settings import Settings

RECORD_NAME = "serving"


def record_served_version(run_directory: str, version: int) -> None:
    """Record the version that is served."""
    path = os.path.join(run_directory, RECORD_NAME)
    temporary_path = f"{path}.{os.getpid()}"
    with open(temporary_path, "w") as file:
        file.write(str(version))
    os.replace(temporary_path, path)


def load_first_model(
    settings: Settings, source: BundleSource, run_directory: str, threads: int
) -> Model:
    """Load the model of a worker that starts, and record its version.

    Raises ValueError (BundleError is one) or OSError if no version can be loaded.
    """
    *preferred, last = _versions_to_try(settings, run_directory)

    model: Model | None = None
    for version in preferred:
        try:
            model = Model(source.open(version), settings, threads)
            break
        except (ValueError, OSError) as error:
            logs.logger.error("version %s refused, loading %s instead: %s", version, last, error)
    if model is None:
        model = Model(source.open(last), settings, threads)

    record_served_version(run_directory, model.version)
    source.record_served(model.version)
    return model


def _versions_to_try(settings: Settings, run_directory: str) -> list[str]:
    """Return the versions to try, in this order."""
    path = os.path.join(run_directory, RECORD_NAME)
    if settings.version != LATEST or not os.path.exists(path):
        return [settings.version]
    with open(path) as file:
        recorded = file.read()

    if settings.reload_seconds:
        # Only the check of the reloader may lead to another version, since a bad one could crash or
        # hang each worker that loads it.
        return [recorded, LATEST]
    return [LATEST, recorded]
