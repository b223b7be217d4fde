"""A loaded model: a bundle, the engine that runs its graph, and the composer of its predictions.

Used by worker processes, the shadow process, the commands `check` and `predict`, and programs that
import `serve`.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from models.bundle import Bundle, BundleError
from models.bundle.verify import Samples, compare_outputs, decode_samples
from models.cpu_quota import available_cores
from models.image import decode
from models.store import LATEST, Store
from serve import logs, options
from serve.engines.base import Engine, EngineFactory, measure_seconds
from serve.engines.select import engine_factories
from serve.prediction import Prediction, PredictionComposer, find_finite_rows
from serve.settings import Settings
from serve.wire import DEFAULT_TOP_K

# A network is light if it takes less time than this for an image. Threads of one interpreter then
# lose more by waiting for each other than they gain.
LIGHT_SECONDS_PER_IMAGE = 80e-6
BFLOAT16_TOLERANCE = 0.03  # largest difference of a probability
SPEED_TEST_REPEATS = 2
SPEED_TEST_BATCH_SIZE = 2
PREDICT_BATCH_SIZE = 16  # images that `Model.predict` decodes at once


class Model:
    """A model that has passed its self check and is warm. It does not change after it is made.

    `bundle` comes from `open_bundle`. Raises BundleError if its signature was not checked although
    the settings demand it, or if no engine reproduces its samples on this machine.
    """

    def __init__(self, bundle: Bundle, settings: Settings, threads: int):
        if settings.public_key and bundle.public_key != settings.public_key:
            raise BundleError(f"{bundle.path}: opened without a check of its signature")
        # Not the bundle itself, which holds the contents of its files.
        self.path = bundle.path
        self.manifest = bundle.manifest
        self.name = bundle.manifest.name
        self.version = bundle.manifest.version
        self.digest = bundle.digest
        self.max_pixels = settings.max_pixels

        samples = decode_samples(bundle)
        if samples.problem:
            raise BundleError(f"{bundle.path}: {samples.problem}")
        self.variant, self.engine = _select_variant(bundle, samples, settings, threads)

        self.calibration = self.manifest.calibration_of(self.variant)
        self.baseline = self.manifest.baseline_of(self.variant)
        self.composer = PredictionComposer(self.manifest.classes, self.calibration)
        # The outputs that each prediction needs.
        self.output_names: tuple[str, ...] = ("probabilities", "energy")
        self.has_activation_maps = "cam" in self.engine.outputs
        # The JSON that HTTP processes receive and GET /model returns.
        self.description = json.dumps(self._describe(), separators=(",", ":")).encode()

        self._warm_up(bundle, settings.max_batch_size)
        run = partial(_run_on_zeros, bundle, self.engine, settings.max_batch_size, False)
        self.run_seconds = measure_seconds(run, SPEED_TEST_REPEATS)  # of a full batch on one core
        self.is_light = self.run_seconds < LIGHT_SECONDS_PER_IMAGE * settings.max_batch_size

    @classmethod
    def open(
        cls, store: str | Path, name: str = "", version: str | int = LATEST, **settings: Any
    ) -> "Model":
        """Load a model to predict in this process, without a server.

        `name` may be left out if the store has one model only. Other settings of the service, such
        as `variant`, `engine` or `threads`, are keyword arguments or IMAGO_ variables. Raises
        BundleError if the bundle is not trusted or not found, ValueError for an invalid setting.
        """
        flags = {"store": store, "model": name, "version": str(version), **settings}
        resolved = options.resolve_model(options.parse_settings(flags))
        return cls.from_settings(resolved, resolved.threads or available_cores())

    @classmethod
    def from_settings(cls, settings: Settings, threads: int) -> "Model":
        """Load the bundle that the settings name. Raises BundleError."""
        return cls(open_bundle(settings, settings.version), settings, threads)

    def decode(self, data: bytes) -> np.ndarray:
        """Decode an image file to uint8 [H, W, C], as the network takes it. Raises ImageError."""
        return decode(data, self.manifest.input, self.max_pixels)

    def predict(self, images: Sequence[bytes], top_k: int = DEFAULT_TOP_K) -> list[Prediction]:
        """Classify image files, given as their bytes.

        Each prediction lists the `top_k` most likely classes. Raises ImageError for the first file
        that can't be decoded.
        """
        predictions: list[Prediction] = []
        for start in range(0, len(images), PREDICT_BATCH_SIZE):
            batch = images[start : start + PREDICT_BATCH_SIZE]
            pixels = np.stack([self.decode(data) for data in batch])
            predictions += self.predict_pixels(pixels, top_k, use_all_threads=True)
        return predictions

    def predict_pixels(
        self, pixels: np.ndarray, top_k: int = DEFAULT_TOP_K, use_all_threads: bool = False
    ) -> list[Prediction]:
        """Classify decoded images, uint8 [N, H, W, C].

        `use_all_threads` speeds up one batch; leave it off if several threads predict at once.
        Raises ValueError if an output is NaN or infinite.
        """
        probabilities, energy = self.engine.run(pixels, self.output_names, use_all_threads)
        if len(find_finite_rows((probabilities, energy))) < len(pixels):
            raise ValueError("the outputs of the model are NaN or infinite")
        texts = self.composer.compose(probabilities, energy, [top_k] * len(pixels))
        return [Prediction.model_validate_json(text + "}") for text in texts]

    def _warm_up(self, bundle: Bundle, max_batch_size: int) -> None:
        """Run the smallest and the largest batch, so that no request waits for a first run."""
        for batch_size in (1, max_batch_size):
            for use_all_threads in (False, True):
                _run_on_zeros(bundle, self.engine, batch_size, use_all_threads)

    def _describe(self) -> dict[str, Any]:
        manifest = self.manifest
        metrics = {
            split: values.model_dump(exclude={"per_class", "confusion"})
            for split, values in manifest.metrics.items()
        }
        samples = [
            {"file": sample.file, "label": manifest.classes[sample.label]}
            for sample in manifest.samples
        ]
        return {
            "name": self.name,
            "version": str(self.version),
            "variant": self.variant,
            "engine": self.engine.name,
            "digest": self.digest,
            "network": manifest.network,
            "created": manifest.created.isoformat(),
            "classes": manifest.classes,
            "input": manifest.input.model_dump(),
            "outputs": list(self.engine.outputs),
            "calibration": self.calibration.model_dump(),
            "metrics": metrics,
            "notes": manifest.notes,
            "explains": ["cam"] if self.has_activation_maps else [],
            "samples": samples,
            "report": (self.path / "report.html").is_file(),
        }


def open_bundle(settings: Settings, version: str | int) -> Bundle:
    """Open a version of the settings' model. Check its signature if the settings have a key.

    Raises BundleError if it can't be trusted.
    """
    return Store(settings.store).open(settings.model, version, public_key=settings.public_key)


def _select_variant(
    bundle: Bundle, samples: Samples, settings: Settings, threads: int
) -> tuple[str, Engine]:
    """Return the variant of the settings, or else the fastest on this machine, and its engine.

    A variant that fails or does not reproduce the samples is left out. Raises the first error if
    all do.
    """
    if settings.variant != "auto":
        return settings.variant, _load_engine(bundle, samples, settings, settings.variant, threads)

    engines: dict[str, Engine] = {}
    failures: list[Exception] = []
    for variant in bundle.manifest.variants:
        try:
            engines[variant] = _load_engine(bundle, samples, settings, variant, threads)
        except Exception as error:  # drivers raise exceptions of any kind
            failures.append(error)

    if not engines:
        raise failures[0]
    for failure in failures:
        logs.logger.warning("variant not used: %s", failure)
    return _fastest(bundle, engines)


def _fastest(bundle: Bundle, engines: dict[str, Engine]) -> tuple[str, Engine]:
    """Return the variant whose engine runs a small batch in the least time."""
    if len(engines) == 1:
        return engines.popitem()

    seconds: dict[str, float] = {}
    for variant, engine in engines.items():
        run = partial(_run_on_zeros, bundle, engine, SPEED_TEST_BATCH_SIZE, False)
        seconds[variant] = measure_seconds(run, SPEED_TEST_REPEATS)
    variant = min(seconds, key=seconds.__getitem__)
    return variant, engines[variant]


def _load_engine(
    bundle: Bundle, samples: Samples, settings: Settings, variant: str, threads: int
) -> Engine:
    """Return the fastest engine that reproduces the samples with this variant.

    Raises the error of the last engine if none does.
    """
    graph = bundle.read_graph(variant)
    precision = bundle.manifest.variants[variant].precision
    *preferred, last = engine_factories(settings.engine, precision)

    def load(factory: EngineFactory) -> Engine:
        engine = factory(graph, threads)
        _check_samples(bundle, samples, variant, engine)
        return engine

    for factory in preferred:
        try:
            return load(factory)
        except Exception as error:  # drivers raise exceptions of any kind
            logs.logger.info("engine not used: %s", error)
    return load(last)


def _check_samples(bundle: Bundle, samples: Samples, variant: str, engine: Engine) -> None:
    """Run the bundle's samples. Raises BundleError if the outputs are not as expected."""
    tolerance = bundle.manifest.variants[variant].tolerance
    if engine.is_bfloat16:
        tolerance = BFLOAT16_TOLERANCE

    for use_all_threads in (False, True):
        arrays = _run(bundle, engine, samples.images, engine.outputs, use_all_threads)
        outputs = dict(zip(engine.outputs, arrays, strict=True))
        verdict = compare_outputs(outputs, samples.expected, tolerance)
        if not verdict:
            raise BundleError(f"{bundle.path}: self check of {variant} failed: {verdict.reason}")
        if engine.is_bfloat16 and verdict.agreement < 1:
            raise BundleError(f"{bundle.path}: bfloat16 changes the label of a sample")


def _run_on_zeros(bundle: Bundle, engine: Engine, batch_size: int, use_all_threads: bool) -> None:
    """Run the graph on black images, to warm it up or to measure it."""
    spec = bundle.manifest.input
    images = np.zeros((batch_size, spec.height, spec.width, spec.channels), np.uint8)
    _run(bundle, engine, images, ("probabilities", "energy"), use_all_threads)


def _run(
    bundle: Bundle,
    engine: Engine,
    images: np.ndarray,
    output_names: tuple[str, ...],
    use_all_threads: bool,
) -> list[np.ndarray]:
    """Run the graph. Raises BundleError if it fails, whatever the engine raises."""
    try:
        return engine.run(images, output_names, use_all_threads)
    except BundleError:
        raise
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise BundleError(f"{bundle.path}: {engine.name} can't run it: {lines[0]}") from error
