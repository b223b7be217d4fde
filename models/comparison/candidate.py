"""A bundle that is compared: its classes, its input, and the graph that would be served."""

from dataclasses import dataclass
from pathlib import Path

from models.bundle import Bundle, GraphFile, Manifest
from models.image import InputSpec


@dataclass(frozen=True)
class Candidate:
    """One of two bundles, with one of its variants."""

    title: str  # NAME/VERSION
    network: str
    classes: list[str]
    input: InputSpec
    variant: str
    graph: GraphFile


def open_candidate(bundle: Bundle, variant: str | None = None) -> Candidate:
    """Return the candidate of a bundle, by default with the variant that is served.

    Raises BundleError for a variant that the bundle does not have.
    """
    name = variant or served_variant(bundle.manifest)
    return _build(bundle.manifest, name, bundle.read_graph(name))


def open_unpublished(manifest: Manifest, directory: Path) -> Candidate:
    """Return the candidate of a bundle whose files are written, but not its checksums."""
    name = served_variant(manifest)
    graph = GraphFile.read(directory / manifest.variants[name].file)
    return _build(manifest, name, graph)


def served_variant(manifest: Manifest) -> str:
    """Return the variant that was fastest where the bundle was made.

    A server chooses in the same way, by its own measurement. fp32 wins where nothing was measured.
    """
    speeds: dict[str, float] = {}
    for name, variant in manifest.variants.items():
        if variant.latency is not None:
            speeds[name] = variant.latency.images_per_second
    if speeds:
        return max(speeds, key=lambda name: speeds[name])
    return "fp32" if "fp32" in manifest.variants else next(iter(manifest.variants))


def _build(manifest: Manifest, variant: str, graph: GraphFile) -> Candidate:
    return Candidate(
        title=manifest.title,
        network=manifest.network,
        classes=manifest.classes,
        input=manifest.input,
        variant=variant,
        graph=graph,
    )
