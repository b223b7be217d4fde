"""A loaded model: a bundle, the engine that runs its graph, and the composer of its predictions.

Used by worker processes, the shadow process, the commands `check` and `predict`, and programs that
import `serve`.
"""

import json
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np

from models.bundle import MANIFEST_FILE, Bundle, BundleError
from models.bundle.verify import Samples, compare_outputs, decode_samples
from models.cpu_quota import available_cores
from models.image import (
    ImageError,
    array_to_input,
    decode,
    decode_full_size,
    resize_to_image,
)
from models.store import LATEST, Store
from serve import logs, options
from serve.bundle_source import BundleSource
from serve.engines.base import Engine, EngineFactory, measure_seconds
from serve.engines.select import engine_factories
from serve.prediction import (
    Prediction,
    PredictionComposer,
    find_finite_rows,
    normalize_activations,
    parse_prediction,
)
from serve.settings import Settings
from serve.wire import DEFAULT_TOP_K

# A network is light if it takes less time than this for an image. Threads of one interpreter then
# lose more by waiting for each other than they gain.
LIGHT_SECONDS_PER_IMAGE = 80e-6
BFLOAT16_TOLERANCE = 0.03  # largest difference of a probability
SPEED_TEST_REPEATS = 2
SPEED_TEST_BATCH_SIZE = 2
LIBRARY_BATCH_SIZE = 16  # images that `Model.predict` and `Model.embed` decode at once

Image: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | np.ndarray
"""An image file by its path or its bytes, or pixels: uint8 [H, W] gray or [H, W, 3] RGB."""
IMAGE_TYPES = (str, os.PathLike, bytes, bytearray, memoryview, np.ndarray)


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
        self.has_embeddings = "embedding" in self.engine.outputs
        # Of one image, by the name of the output.
        self.output_shapes = _measure_output_shapes(bundle, self.engine)
        # The JSON that HTTP processes receive and GET /model returns.
        self.description = json.dumps(self._describe(), separators=(",", ":")).encode()

        self._warm_up(bundle, settings.max_batch_size)
        run = partial(_run_on_zeros, bundle, self.engine, settings.max_batch_size, False)
        self.run_seconds = measure_seconds(run, SPEED_TEST_REPEATS)  # of a full batch on one core
        self.is_light = self.run_seconds < LIGHT_SECONDS_PER_IMAGE * settings.max_batch_size

    @classmethod
    def open(
        cls, path: str | Path, name: str = "", version: str | int = LATEST, **settings: Any
    ) -> "Model":
        """Load a model to predict in this process, without a server.

            Model.open("artifacts/store/photos/latest")   # a version of a store, or any bundle
            Model.open("artifacts/store", "photos", 3)    # the same by name and version

        `path` is the directory of a bundle, of a model or of a store, or the URL of a store in a
        bucket. `name` may be left out if the store has one model only. Other settings of the
        service, such as `variant`, `engine` or `threads`, are keyword arguments or IMAGO_
        variables. Raises BundleError if the bundle is not trusted or does not exist, ValueError
        for an invalid setting.
        """
        is_url = "://" in str(path)
        path = path if is_url else Path(path).expanduser()
        flags = {"store": path, "model": name, "version": str(version), **settings}
        parsed = options.parse_settings(flags)
        threads = parsed.threads or available_cores()

        bundle_path = None if name or is_url else _find_bundle(Path(path), parsed.version)
        if bundle_path is not None:
            return cls(Bundle(bundle_path, public_key=parsed.public_key), parsed, threads)
        return cls.from_settings(options.resolve_model(parsed), threads)

    @classmethod
    def from_settings(cls, settings: Settings, threads: int) -> "Model":
        """Load the bundle that the settings name. Raises BundleError."""
        return cls(open_bundle(settings, settings.version), settings, threads)

    def decode(self, data: bytes) -> np.ndarray:
        """Decode an image file to uint8 [H, W, C], as the network takes it. Raises ImageError."""
        return decode(data, self.manifest.input, self.max_pixels)

    @overload
    def predict(  # type: ignore[overload-overlap]  # text is iterable, too
        self, images: Image, top_k: int = ...
    ) -> Prediction: ...
    @overload
    def predict(self, images: Iterable[Image], top_k: int = ...) -> list[Prediction]: ...
    def predict(
        self, images: Image | Iterable[Image], top_k: int = DEFAULT_TOP_K
    ) -> Prediction | list[Prediction]:
        """Classify one image, or several: a list gives a list.

        An image is the path or the bytes of a file, or an array, uint8 [H, W] for gray or
        [H, W, 3] for RGB. Each prediction lists the `top_k` most likely classes. Raises
        ImageError for the first image that can't be decoded, OSError for a file that can't be
        read, and ValueError for an array that is no image.
        """
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}")
        if isinstance(images, IMAGE_TYPES):
            pixels = self._load_pixels(images)[None]
            return self.predict_pixels(pixels, top_k, use_all_threads=True)[0]

        predictions: list[Prediction] = []
        for pixels in self._load_batches(images):
            predictions += self.predict_pixels(pixels, top_k, use_all_threads=True)
        return predictions

    def embed(self, images: Image | Iterable[Image]) -> np.ndarray:
        """Return the features before the last layer: float32 [D], of several images [N, D].

        Images that look alike to the network have embeddings of a high cosine similarity. Images
        and errors are those of `predict`; raises ValueError if the model has no embeddings.
        """
        if not self.has_embeddings:
            raise ValueError(f"{self.name}, version {self.version}: the model has no embeddings")
        if isinstance(images, IMAGE_TYPES):
            return self._embed_pixels(self._load_pixels(images)[None])[0]

        rows = [self._embed_pixels(pixels) for pixels in self._load_batches(images)]
        if not rows:
            return np.empty((0, *self.output_shapes["embedding"]), np.float32)
        return np.concatenate(rows)

    @overload
    def explain(  # type: ignore[overload-overlap]
        self, images: Image, label: str | None = ...
    ) -> np.ndarray: ...
    @overload
    def explain(self, images: Iterable[Image], label: str | None = ...) -> list[np.ndarray]: ...
    def explain(
        self, images: Image | Iterable[Image], label: str | None = None
    ) -> np.ndarray | list[np.ndarray]:
        """Return the class-activation map of an image: float32 [H, W] in 0..1, of its shape.

        1 marks what speaks most for the class: the predicted one, or `label`. What the network
        does not see, such as the part that a crop leaves out, is 0. Images and errors are those
        of `predict`; a list gives a list. Raises ValueError if the model has no maps, or no class
        `label`. Method: CAM, Zhou et al. 2016.
        """
        if not self.has_activation_maps:
            raise ValueError(
                f"{self.name}, version {self.version}: the network has no class-activation maps; "
                "they need global average pooling and one linear layer at its end"
            )
        index = None if label is None else self._find_class(label)
        if isinstance(images, IMAGE_TYPES):
            return self._explain_image(images, index)
        return [self._explain_image(image, index) for image in images]

    def predict_pixels(
        self, pixels: np.ndarray, top_k: int = DEFAULT_TOP_K, use_all_threads: bool = False
    ) -> list[Prediction]:
        """Classify images that are decoded to the network's input, uint8 [N, H, W, C].

        `use_all_threads` speeds up one batch; leave it off if several threads predict at once.
        Raises ValueError if an output is NaN or infinite.
        """
        probabilities, energy = self.run(pixels, self.output_names, use_all_threads)
        return self.compose_predictions(probabilities, energy, top_k)

    def run(
        self, pixels: np.ndarray, output_names: tuple[str, ...], use_all_threads: bool = False
    ) -> list[np.ndarray]:
        """Return outputs of the graph for uint8 [N, H, W, C], in the order of the names.

        Raises ValueError if one is NaN or infinite.
        """
        outputs = self.engine.run(pixels, output_names, use_all_threads)
        if len(find_finite_rows(outputs)) < len(pixels):
            raise ValueError("the outputs of the model are NaN or infinite")
        return outputs

    def compose_predictions(
        self, probabilities: np.ndarray, energy: np.ndarray, top_k: int
    ) -> list[Prediction]:
        """Return the predictions of the outputs [N, K] and [N]."""
        texts = self.composer.compose(probabilities, energy, [top_k] * len(probabilities))
        return [parse_prediction(text + "}") for text in texts]

    def __repr__(self) -> str:
        return (
            f"<Model {self.name}, version {self.version}: {len(self.manifest.classes)} classes, "
            f"{self.variant} on {self.engine.name}>"
        )

    def _load_pixels(self, image: Image, prefix: str = "") -> np.ndarray:
        """Return the network's input, uint8 [H, W, C]. Errors name the file or the position."""
        try:
            if isinstance(image, np.ndarray):
                return array_to_input(image, self.manifest.input)
            return self.decode(_read_image(image))
        except ImageError as error:
            if isinstance(image, str | os.PathLike):
                prefix = f"{os.fspath(image)}: "
            raise type(error)(f"{prefix}{error}") from error
        except ValueError as error:
            raise ValueError(f"{prefix}{error}") from error

    def _load_batches(self, images: Iterable[Image]) -> Iterator[np.ndarray]:
        """Yield the network's input for a few images at a time, uint8 [N, H, W, C]."""
        batch: list[np.ndarray] = []
        for position, image in enumerate(images):
            batch.append(self._load_pixels(image, f"image {position}: "))
            if len(batch) == LIBRARY_BATCH_SIZE:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)

    def _embed_pixels(self, pixels: np.ndarray) -> np.ndarray:
        (embeddings,) = self.run(pixels, ("embedding",), use_all_threads=True)
        return embeddings

    def _find_class(self, label: str) -> int:
        if label not in self.manifest.classes:
            raise ValueError(f"no class {label!r}; there are {', '.join(self.manifest.classes)}")
        return self.manifest.classes.index(label)

    def _explain_image(self, image: Image, index: int | None) -> np.ndarray:
        """Return the activation map of the class with this index; None: the predicted class."""
        pixels = self._load_pixels(image)
        if isinstance(image, np.ndarray):
            height, width = image.shape[:2]
        else:  # only decoding tells the size of the upright image
            height, width, _ = decode_full_size(_read_image(image), 1, self.max_pixels).shape

        names = ("probabilities", "cam")
        probabilities, activations = self.run(pixels[None], names, use_all_threads=True)
        if index is None:
            index = int(probabilities[0].argmax())
        activation_map = normalize_activations(activations[0, index]).astype(np.float32)
        return resize_to_image(activation_map, (height, width), self.manifest.input)

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
            "output_shapes": self.output_shapes,
            "calibration": self.calibration.model_dump(),
            "metrics": metrics,
            "notes": manifest.notes,
            "explains": ["cam"] if self.has_activation_maps else [],
            "samples": samples,
            "report": (self.path / "report.html").is_file(),
        }


def _read_image(image: str | os.PathLike[str] | bytes | bytearray | memoryview) -> bytes:
    """Return the bytes of an image file. Raises OSError."""
    if isinstance(image, str | os.PathLike):
        return Path(image).expanduser().read_bytes()
    return bytes(image)


def _find_bundle(path: Path, version: str) -> Path | None:
    """Return the directory of the bundle that `path` names; None if it may be a store.

    Raises BundleError for a version that does not exist.
    """
    if (path / MANIFEST_FILE).is_file():
        return path
    if Store(path).names():
        return None

    # `latest` can be a file with the number, and `path` the directory of a model.
    parent = path.parent
    if path.name == LATEST or path.name.isdecimal():
        return Store(parent.parent).path(parent.name, path.name)
    if Store(parent).versions(path.name):
        return Store(parent).path(path.name, version)
    return None


def open_bundle(settings: Settings, version: str | int) -> Bundle:
    """Open a version of the settings' model. Check its signature if the settings have a key.

    Raises BundleError if it can't be trusted.
    """
    return BundleSource(settings).open(version)


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


def _measure_output_shapes(bundle: Bundle, engine: Engine) -> dict[str, list[int]]:
    """Return the shape of each output for one image, without the dimension of the batch."""
    spec = bundle.manifest.input
    image = np.zeros((1, spec.height, spec.width, spec.channels), np.uint8)
    arrays = _run(bundle, engine, image, engine.outputs, False)
    outputs = zip(engine.outputs, arrays, strict=True)
    return {name: list(array.shape[1:]) for name, array in outputs}


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
