"""Verify that a bundle gives the same outputs on this machine as on the one that exported it.

`imago models verify` runs `verify_bundle`. The workers of the server and the export of training
use its parts. Needs onnxruntime, never torch.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from models.bundle.bundle import SAMPLES_DIRECTORY, Bundle, GraphFile
from models.bundle.errors import BundleError
from models.bundle.files import SIGNATURE_FILE
from models.bundle.manifest import MANIFEST_FILE, Variant
from models.cpu_quota import available_cores
from models.image import ImageError, decode

MAX_PIXEL_DIFF = 1.0
"""Mean |difference| in 0..255 that another build of the JPEG library may cause."""

EXACT_TOLERANCE = 1e-3
"""Variants with a tolerance up to this reproduce all outputs; int8 only the probabilities."""

TIMED_BATCH_SIZES = (1, 8)

Outputs = dict[str, np.ndarray]
Runner = Callable[[np.ndarray], Outputs]
"""Runs a graph: uint8 [N, H, W, C] to its outputs by name."""


@dataclass(frozen=True)
class Comparison:
    """How close outputs are to the expected ones. `bool(comparison)`: whether close enough."""

    max_abs_diff: float
    """Largest |difference| of any probability."""

    agreement: float
    """Share of images with the same label, 0..1."""

    reason: str
    """What is wrong, as one clause; empty where nothing is."""

    def __bool__(self) -> bool:
        return not self.reason


def compare_outputs(outputs: Outputs, expected: Outputs, tolerance: float = 1e-4) -> Comparison:
    """Compare an engine's outputs, one row an image, with the expected ones.

    `tolerance` bounds the |difference| of probabilities; take it from the variant in the manifest.
    All outputs that both have must have the same shape and be finite. With the tolerance of an
    exact variant, they must also lie within ten times the tolerance of the expected, relative to
    the largest expected magnitude.
    """
    if "probabilities" not in outputs:
        return Comparison(float("inf"), 0.0, "no probabilities among the outputs")

    reason = ""
    for name in sorted(set(outputs) & set(expected)):
        actual = np.asarray(outputs[name])
        wanted = expected[name]
        if actual.shape != wanted.shape:
            problem = f"{name} has the shape {actual.shape}, not {wanted.shape}"
            return Comparison(float("inf"), 0.0, problem)
        if not np.isfinite(actual).all():
            return Comparison(float("inf"), 0.0, f"{name} is not finite")

        if name != "probabilities" and tolerance <= EXACT_TOLERANCE:
            difference = np.abs(actual - wanted).max()
            magnitude = max(1.0, np.abs(wanted).max())
            if difference > 10 * tolerance * magnitude:
                reason = f"{name} differs by {difference:.2g} from the expected"

    actual = outputs["probabilities"]
    wanted = expected["probabilities"]
    max_abs_diff = float(np.abs(actual - wanted).max())
    agreement = float((actual.argmax(1) == wanted.argmax(1)).mean())
    if max_abs_diff > tolerance:
        reason = (
            f"probabilities differ by {max_abs_diff:.2g} from the expected "
            f"({tolerance:.2g} is allowed)"
        )
    return Comparison(max_abs_diff, agreement, reason)


def load_runner(graph: GraphFile, threads: int = 0) -> Runner:
    """Load a graph into onnxruntime on the CPU, and return a function that runs it.

    0 threads means one for each core that this process may use. Both loading and running raise
    BundleError where onnxruntime fails.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    options.log_severity_level = 3  # errors only
    try:
        session = onnxruntime.InferenceSession(
            graph.content, options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's exceptions share no other base class
        cause = str(error).splitlines()[0]
        raise BundleError(f"{graph.path}: onnxruntime can't load it: {cause}") from error
    names = [output.name for output in session.get_outputs()]

    def run(image: np.ndarray) -> Outputs:
        try:
            return dict(zip(names, session.run(None, {"image": image}), strict=True))
        except Exception as error:
            cause = str(error).splitlines()[0]
            raise BundleError(f"{graph.path}: onnxruntime can't run it: {cause}") from error

    return run


def measure_latency_ms(
    run: Callable[[], object], seconds: float = 0.3, min_calls: int = 3
) -> float:
    """Return the median milliseconds of a call.

    Calls `run` once to warm up, then for about `seconds` and at least `min_calls` times.
    """
    run()
    milliseconds: list[float] = []
    end = time.perf_counter() + seconds
    while len(milliseconds) < min_calls or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        milliseconds.append(1000 * (time.perf_counter() - start))
    return statistics.median(milliseconds)


@dataclass(frozen=True)
class Samples:
    """The sample images of a bundle and the outputs expected for them."""

    images: np.ndarray
    """uint8 [S,H,W,C], as decoded where the bundle was made."""

    expected: Outputs
    """Outputs of the torch network by name, one row an image."""

    pixel_diff: float
    """Mean |difference| between `images` and what this machine decodes, 0..255."""

    @property
    def problem(self) -> str:
        """What is wrong with decoding on this machine, as one clause; empty where nothing is."""
        if self.pixel_diff <= MAX_PIXEL_DIFF:
            return ""
        return (
            "samples decode differently on this machine, "
            f"by {self.pixel_diff:.2g} of 255 on average"
        )


def decode_samples(bundle: Bundle) -> Samples:
    """Decode the samples of a bundle on this machine.

    Raises BundleError where there are none, one is not an image, or expected.npz does not match.
    """
    input_spec = bundle.manifest.input
    decoded: list[np.ndarray] = []
    for sample, data in zip(bundle.manifest.samples, bundle.read_samples(), strict=True):
        try:
            decoded.append(decode(data, input_spec))
        except ImageError as error:
            path = bundle.path / SAMPLES_DIRECTORY / sample.file
            raise BundleError(f"{path}: {error}") from error
    if not decoded:
        raise BundleError(
            f"{bundle.path / MANIFEST_FILE}: lists no samples, so the bundle can't be verified"
        )

    pixels = np.stack(decoded)
    expected = bundle.read_expected()
    images = expected.get("pixels", pixels)
    pixel_diff = float(np.abs(images.astype(np.int16) - pixels).mean())
    return Samples(images, expected, pixel_diff)


@dataclass(frozen=True)
class VariantReport:
    """Outputs and speed of one variant on this machine."""

    variant: str
    comparison: Comparison
    tolerance: float

    batch_ms: dict[int, float]
    """Batch size -> median milliseconds."""


@dataclass(frozen=True)
class BundleReport:
    """How a bundle with valid checksums and signature behaves on this machine."""

    bundle: Bundle

    signed: str
    """"no", "yes, not checked" or "yes, by the given key"."""

    samples: Samples
    variants: list[VariantReport]

    @property
    def problems(self) -> list[str]:
        """What is wrong, one clause each; empty where the bundle passes."""
        problems: list[str] = []
        for report in self.variants:
            if not report.comparison:
                problems.append(f"{report.variant}: {report.comparison.reason}")
        if self.samples.problem:
            problems.append(self.samples.problem)
        return problems


def verify_bundle(path: Path, public_key: Path | None = None, seconds: float = 0.3) -> BundleReport:
    """Check signature (with a key), checksums and graphs, then run the samples by each variant.

    Raises BundleError for a bundle that was changed or can't be read. A bundle that is intact, but
    gives other outputs on this machine, has `problems`. `seconds`: how long each batch size of each
    variant is timed.
    """
    bundle = Bundle(path, public_key=public_key)
    signed = "yes, not checked" if (path / SIGNATURE_FILE).exists() else "no"
    if public_key:
        signed = "yes, by the given key"

    samples = decode_samples(bundle)
    variants: list[VariantReport] = []
    for name, variant in bundle.manifest.variants.items():
        run = load_runner(bundle.read_graph(name))
        variants.append(_verify_variant(name, variant, run, samples, seconds))
    return BundleReport(bundle, signed, samples, variants)


def _verify_variant(
    name: str, variant: Variant, run: Runner, samples: Samples, seconds: float
) -> VariantReport:
    comparison = compare_outputs(run(samples.images), samples.expected, variant.tolerance)

    batch_ms: dict[int, float] = {}
    for batch_size in TIMED_BATCH_SIZES:
        batch = np.resize(samples.images, (batch_size, *samples.images.shape[1:]))
        batch_ms[batch_size] = measure_latency_ms(partial(run, batch), seconds)
    return VariantReport(name, comparison, variant.tolerance, batch_ms)
