"""A loaded model: bundle, engine and answers in one immutable object, checked and warm before anybody sees it.

A worker holds exactly one and reads it once a batch (`Worker.model`), so assigning another one swaps models between two
batches.
"""

import json
import time

import numpy as np

from models.bundle import Bundle, BundleError
from models.bundle.signing import verify_signature
from models.bundle.verify import Samples, compare_outputs, decode_samples
from serve import logs
from serve.engines import engine
from serve.prediction import Answers
from serve.settings import Settings

LIGHT = 80e-6  # seconds an image: threads that share an interpreter then lose more by waiting for it than they gain
BF16_TOLERANCE = 0.03  # of a probability, and every sample must keep its label


class Model:
    """Raises BundleError where the bundle can't be trusted, and where it answers its own samples otherwise here."""

    def __init__(self, bundle: Bundle, settings: Settings, threads: int):
        if settings.public_key:
            verify_signature(bundle.path, settings.public_key)
        self.bundle, self.manifest = bundle, bundle.manifest
        self.name, self.version, self.digest = (
            self.manifest.name,
            self.manifest.version,
            bundle.digest,
        )
        samples = decode_samples(bundle)
        if samples.problem:
            raise BundleError(f"{bundle.path}: {samples.problem}")
        self.variant, self.engine = _choose(bundle, samples, settings, threads)
        self.answers = Answers(self.manifest)
        self.wanted = ("probabilities", "energy")
        self.explains = [name for name in ("cam",) if name in self.engine.outputs]
        self.hello = json.dumps(
            self.describe(), separators=(",", ":")
        ).encode()  # what HTTP processes are told
        self.warm(settings.max_batch_size)

    def warm(self, batch: int) -> None:
        """Touch the sizes that come, so that no request pays for the first run; see whether it is light."""
        spec = self.manifest.input
        for size in (1, batch):
            images = np.zeros((size, spec.height, spec.width, spec.channels), np.uint8)
            for alone in (False, True):
                run(self.bundle, self.engine, images, self.wanted, alone)
        self.run_seconds = _seconds(self.engine, self.bundle, batch)
        self.light = self.run_seconds < LIGHT * batch

    def describe(self) -> dict:
        """What /model tells."""
        manifest = self.manifest
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
            "calibration": manifest.calibration.model_dump(),
            "metrics": {
                part: m.model_dump(include={"images", "accuracy", "top5", "nll", "ece"})
                for part, m in manifest.metrics.items()
            },
            "notes": manifest.notes,
            "explains": self.explains,
            "samples": [
                {"file": s.file, "label": manifest.classes[s.label]} for s in manifest.samples
            ],
            "report": (self.bundle.path / "report.html").is_file(),
        }


def run(
    bundle: Bundle,
    candidate: engine.Engine,
    images: np.ndarray,
    wanted: tuple[str, ...],
    alone: bool,
) -> list[np.ndarray]:
    """As Engine.run. Raises BundleError where the graph fails, whatever the engine raises."""
    try:
        return candidate.run(images, wanted, alone)
    except BundleError:
        raise
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise BundleError(f"{bundle.path}: {candidate.name} can't run it: {said}") from error


def check(bundle: Bundle, samples: Samples, variant: str, candidate: engine.Engine) -> None:
    """Run the bundle's samples through this engine, here. Raises BundleError where they come out otherwise."""
    wanted = candidate.outputs
    tolerance = (
        BF16_TOLERANCE
        if candidate.name.endswith("bf16")
        else bundle.manifest.variants[variant].tolerance
    )
    for alone in (False, True):
        outputs = dict(
            zip(wanted, run(bundle, candidate, samples.images, wanted, alone), strict=True)
        )
        verdict = compare_outputs(outputs, samples.expected, tolerance)
        if not verdict:
            raise BundleError(f"{bundle.path}: self check of {variant} failed: {verdict.reason}")
        if tolerance == BF16_TOLERANCE and verdict.agreement < 1:
            raise BundleError(f"{bundle.path}: bfloat16 changes the label of a sample")


def _choose(
    bundle: Bundle, samples: Samples, settings: Settings, threads: int
) -> tuple[str, engine.Engine]:
    """The variant that was asked for, or else the one that this machine runs fastest, with its engine.

    One that answers the samples wrongly here, or not at all, is none to choose from; where all do, that is raised.
    """
    if settings.variant != "auto":
        return settings.variant, _engine(bundle, samples, settings, settings.variant, threads)
    candidates, failed = dict[str, engine.Engine](), list[Exception]()
    for name in bundle.manifest.variants:
        try:
            candidates[name] = _engine(bundle, samples, settings, name, threads)
        except Exception as error:  # drivers raise what they like
            failed.append(error)
    if not candidates:
        raise failed[0]
    for reason in failed:
        logs.logger.warning("a variant is not taken: %s", reason)
    if len(candidates) == 1:
        return candidates.popitem()
    fastest = min(candidates, key=lambda name: _seconds(candidates[name], bundle))
    return fastest, candidates[fastest]


def _engine(
    bundle: Bundle, samples: Samples, settings: Settings, variant: str, threads: int
) -> engine.Engine:
    """The fastest way to run a variant that answers the samples rightly here. Raises BundleError where none does."""
    path = bundle.variant_path(variant)
    *faster, last = engine.makers(settings.engine, bundle.manifest.variants[variant].precision)
    for make in faster:
        try:
            return _checked(make(path, threads), bundle, samples, variant)
        except Exception as error:  # drivers raise what they like
            logs.logger.info("a faster way is not taken: %s", error)
    return _checked(last(path, threads), bundle, samples, variant)


def _checked(
    candidate: engine.Engine, bundle: Bundle, samples: Samples, variant: str
) -> engine.Engine:
    check(bundle, samples, variant, candidate)
    return candidate


def _seconds(candidate: engine.Engine, bundle: Bundle, batch: int = 2, runs: int = 2) -> float:
    """Least seconds of a run; the first call, which allocates, is left out."""
    spec = bundle.manifest.input
    images = np.zeros((batch, spec.height, spec.width, spec.channels), np.uint8)
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        run(bundle, candidate, images, ("probabilities",), False)
        times.append(time.perf_counter() - start)
    return min(times[1:])
