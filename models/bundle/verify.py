"""Does a bundle do on this machine what it did where it was made? Needs onnxruntime, never torch.

`compare_outputs` is shared by `python -m models verify` and by the server's self check.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from models.bundle import MANIFEST_FILE, SAMPLES_DIRECTORY, Bundle, BundleError
from models.bundle.checksums import SIGNATURE
from models.cpu_quota import available_cores
from models.image import ImageError, decode

MAX_PIXEL_DIFF = 1.0  # mean |difference| in 0..255 that other builds of the JPEG library may cause
Runner = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Verdict:
    """How near the outputs are to what was expected. True where they are near enough."""

    max_abs_diff: float  # of any probability
    agreement: float  # share of images with the same label, 0..1
    reason: str  # one clause on what is wrong, empty where nothing is

    def __bool__(self) -> bool:
        return not self.reason


def compare_outputs(
    outputs: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-4
) -> Verdict:
    """Compare what an engine gave, a row an image, with what is expected of those images.

    `tolerance` bounds |difference| of probabilities; take it from the variant's manifest entry. The other outputs that
    both have must have the same shape, be finite and, where the tolerance is that of an exact variant (1e-3 or less),
    lie within ten times the tolerance of the expected, relative to the largest magnitude expected.
    """
    reason, probabilities = "", expected["probabilities"]
    if "probabilities" not in outputs:
        return Verdict(float("inf"), 0.0, "no probabilities among the outputs")
    for name in sorted(set(outputs) & set(expected)):
        found, wanted = np.asarray(outputs[name]), expected[name]
        if found.shape != wanted.shape:
            return Verdict(
                float("inf"), 0.0, f"{name} has the shape {found.shape}, not {wanted.shape}"
            )
        if not np.isfinite(found).all():
            return Verdict(float("inf"), 0.0, f"{name} is not finite")
        scale = max(1.0, np.abs(wanted).max())
        if (
            name != "probabilities"
            and tolerance <= 1e-3
            and np.abs(found - wanted).max() > 10 * tolerance * scale
        ):
            reason = f"{name} differs by {np.abs(found - wanted).max():.2g} from the expected"
    difference = float(np.abs(outputs["probabilities"] - probabilities).max())
    agreement = float((outputs["probabilities"].argmax(1) == probabilities.argmax(1)).mean())
    if difference > tolerance:
        reason = f"probabilities differ by {difference:.2g} from the expected, and {tolerance:.2g} is allowed"
    return Verdict(difference, agreement, reason)


def load_runner(path: Path, threads: int = 0) -> Runner:
    """A function from uint8 [N, H, W, C] to the graph's outputs by name, on the CPU; 0 threads means one for each core
    that this process may use.

    Raises BundleError where onnxruntime can't load the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no base class but this
        raise BundleError(
            f"{path}: onnxruntime can't load it: {str(error).splitlines()[0]}"
        ) from error
    names = [output.name for output in session.get_outputs()]

    def run(image: np.ndarray) -> dict[str, np.ndarray]:
        try:
            return dict(zip(names, session.run(None, {"image": image}), strict=True))
        except Exception as error:
            raise BundleError(
                f"{path}: onnxruntime can't run it: {str(error).splitlines()[0]}"
            ) from error

    return run


def measure_latency_ms(run: Callable[[], object], seconds: float = 0.3, least: int = 3) -> float:
    """Median milliseconds of a call, over about `seconds` and at least `least` calls, after one to warm up."""
    run()
    times, end = list[float](), time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


@dataclass(frozen=True)
class Samples:
    """What a bundle brings to be checked by."""

    images: np.ndarray  # uint8 [S,H,W,C], as they were decoded where the bundle was made
    expected: dict[str, np.ndarray]  # what the network gave there, by name, a row an image
    pixel_diff: float  # mean |difference| to what this machine decodes, 0..255

    @property
    def problem(self) -> str:
        """One clause where this machine decodes otherwise than other builds of the same library may, else empty."""
        if self.pixel_diff <= MAX_PIXEL_DIFF:
            return ""
        return f"samples decode differently here, by {self.pixel_diff:.2g} of 255 on average"


def decode_samples(bundle: Bundle) -> Samples:
    """Decode the samples of a bundle. Raises BundleError where there are none, or one is no image."""
    spec, decoded = bundle.manifest.input, []
    for sample, data in zip(bundle.manifest.samples, bundle.sample_bytes(), strict=True):
        try:
            decoded.append(decode(data, spec))
        except ImageError as error:
            raise BundleError(
                f"{bundle.path / SAMPLES_DIRECTORY / sample.file}: {error}"
            ) from error
    if not decoded:
        raise BundleError(f"{bundle.path / MANIFEST_FILE}: names no samples to check the bundle by")
    expected = bundle.expected()
    images = expected.get("pixels", np.stack(decoded))
    if images.shape != np.shape(decoded) or len(images) != len(expected.get("probabilities", ())):
        raise BundleError(
            f"{bundle.path}: the expected outputs are not of the {len(decoded)} samples"
        )
    return Samples(images, expected, float(np.abs(images.astype(np.int16) - decoded).mean()))


@dataclass(frozen=True)
class VariantCheck:
    """What one variant did on this machine."""

    variant: str
    verdict: Verdict
    tolerance: float
    batch_ms: dict[int, float]  # batch size -> median milliseconds


@dataclass(frozen=True)
class Check:
    """What a bundle did on this machine: digests and signatures were right, or there would be no such object."""

    bundle: Bundle
    signed: str  # "no", "yes, not checked" or "yes, by the given key"
    samples: Samples
    variants: list[VariantCheck]

    @property
    def problems(self) -> list[str]:
        found = [f"{c.variant}: {c.verdict.reason}" for c in self.variants if not c.verdict]
        return [*found, self.samples.problem] if self.samples.problem else found


def check_bundle(path: Path, public_key: Path | None = None, seconds: float = 0.3) -> Check:
    """Check signature (where a key is given), digests and graphs, then run the samples through each variant.

    Raises BundleError for a bundle that is not what was written; one that is, but answers otherwise on this machine,
    has `problems`.
    """
    signed = "yes, not checked" if (path / SIGNATURE).exists() else "no"
    if public_key:
        from models.bundle.signing import verify_signature

        verify_signature(path, public_key)
        signed = "yes, by the given key"
    bundle = Bundle(path)
    samples, checks = decode_samples(bundle), []
    for name, variant in bundle.manifest.variants.items():
        run = load_runner(bundle.variant_path(name))
        verdict = compare_outputs(run(samples.images), samples.expected, variant.tolerance)
        timed = {n: np.resize(samples.images, (n, *samples.images.shape[1:])) for n in (1, 8)}
        batch_ms = {
            n: measure_latency_ms(partial(run, batch), seconds) for n, batch in timed.items()
        }
        checks.append(VariantCheck(name, verdict, variant.tolerance, batch_ms))
    return Check(bundle, signed, samples, checks)
