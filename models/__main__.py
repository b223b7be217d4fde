"""`imago models`, also `python -m models`: list, check, sign and copy bundles.

Exit status: 0 done; 1 `verify` found a bundle that must not be served, or `compare` a new version
that is worse than the old one beyond a budget; 2 invalid arguments, or something that can't be
done. Never imports torch.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TypeAlias

from models.bundle import Bundle, BundleError, Calibration, Latency, Manifest, Variant
from models.bundle.verify import BundleReport, VariantReport, verify_bundle
from models.comparison import ComparisonError, GateConfig, compare_candidates, decide
from models.comparison.candidate import open_candidate
from models.comparison.page import describe_comparison, render_page
from models.comparison.test_images import choose_images_of_bundles, limit_images
from models.store import LATEST, Store, StoreError
from models.store.copying import copy_version

DEFAULT_STORE = "artifacts/store"
STORE_VARIABLE = "IMAGO_STORE"

Options = argparse.Namespace
Command = Callable[[Options], int]
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status. Errors are one line on stderr."""
    options = build_parser().parse_args(arguments)
    try:
        return options.command(options)
    except BundleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if options.command is run_verify else 2
    except ComparisonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # such as a full disk, or a store that is read-only
        print(f"error: {error.filename or options.store}: {error.strerror}", file=sys.stderr)
        return 2


# ---------------------------------------------------------------------------------------------
# Arguments


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; it sets `command` to the function that runs."""
    parser = argparse.ArgumentParser(
        prog="imago models",
        description="List, check and sign bundles, and move them between stores.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_bundle_commands(commands)
    _add_latest_commands(commands)
    _add_copy_commands(commands)
    return parser


def _add_bundle_commands(commands: Subparsers) -> None:
    _add_command(commands, "list", run_list, "list names, versions and their test accuracy")

    show = _add_command(commands, "show", run_show, "show the main facts of a bundle's manifest")
    _add_name(show)
    _add_version(show)
    show.add_argument("--json", action="store_true", help="print the manifest itself")

    verify = _add_command(
        commands,
        "verify",
        run_verify,
        "check checksums, graphs and outputs of a bundle on this machine; exit status 0 or 1",
    )
    _add_name(verify, "directory of a bundle, or name in the store")
    _add_version(verify)
    verify.add_argument(
        "--public-key",
        type=Path,
        help="PEM file; the bundle must be signed with its private key",
    )

    sign = _add_command(commands, "sign", run_sign, "sign a bundle with a key file")
    _add_name(sign)
    _add_version(sign)
    sign.add_argument(
        "--key", type=Path, required=True, help="PEM file with an elliptic curve private key"
    )
    _add_compare_command(commands)


def _add_compare_command(commands: Subparsers) -> None:
    compare = _add_command(
        commands,
        "compare",
        run_compare,
        "run two versions on the same test images; exit status 1 where NEW is worse than allowed",
    )
    which = "directory of a bundle, or NAME or NAME/VERSION in the store"
    compare.add_argument("old", metavar="OLD", help=which)
    compare.add_argument("new", metavar="NEW", help=which)
    compare.add_argument(
        "--data",
        type=Path,
        help="folder with the test images, or with other labelled images in one folder a class, or "
        "a CSV file with path and label (default: the test images that both bundles list)",
    )
    compare.add_argument("--html", type=Path, metavar="FILE", help="write a page; needs jinja2")
    compare.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results; - for stdout"
    )
    for name in ("old-variant", "new-variant"):
        compare.add_argument(
            f"--{name}", help="fp32 or int8 (default: the fastest where the bundle was made)"
        )
    defaults = GateConfig()
    budgets = {
        "accuracy": "accuracy that may be lost, 0..1, beyond its confidence interval",
        "class-recall": "recall that any class may lose, 0..1, beyond its confidence interval",
        "calibration": "calibration error that may be added, 0..1, beyond its confidence interval",
        "latency": "factor by which one image may take longer; less than 1 ms more passes",
        "confidence": "level of the confidence intervals, 0..1",
    }
    for name, help in budgets.items():
        default = getattr(defaults, name.replace("-", "_"))
        compare.add_argument(
            f"--{name}", type=float, default=default, help=f"{help} (default: %(default)s)"
        )
    compare.add_argument(
        "--live-images",
        type=int,
        default=defaults.live_images,
        help="live images of equal weight from which their accuracy counts in place of that of the "
        "test part (default: %(default)s)",
    )
    compare.add_argument(
        "--images", type=int, default=0, help="images of each part at most; 0 for all (default: 0)"
    )


def _add_latest_commands(commands: Subparsers) -> None:
    promote = _add_command(
        commands,
        "promote",
        run_promote,
        "point latest at a version, unless the gate of training has refused it",
    )
    _add_name(promote)
    promote.add_argument("version", help="number of the version")
    promote.add_argument(
        "--force", action="store_true", help="also a version that the gate has refused"
    )

    rollback = _add_command(
        commands, "rollback", run_rollback, "point latest at the version before it"
    )
    _add_name(rollback)

    prune = _add_command(
        commands, "prune", run_prune, "delete old versions; latest and the one before it stay"
    )
    _add_name(prune)
    prune.add_argument(
        "--keep",
        type=_parse_positive,
        default=3,
        help="number of newest versions to keep (default: %(default)s)",
    )


def _add_copy_commands(commands: Subparsers) -> None:
    push_command = _add_command(
        commands, "push", run_push, "copy a bundle to another store and check it there"
    )
    pull_command = _add_command(
        commands, "pull", run_pull, "copy a bundle from another store and check it"
    )
    for parser in (push_command, pull_command):
        _add_name(parser)
        _add_version(parser)
        parser.add_argument(
            "url",
            help="the other store: a directory, or s3://bucket/prefix, gs://…, az://…, file:///…",
        )
        parser.add_argument("--no-promote", action="store_true", help="leave latest where it is")


def _add_command(
    commands: Subparsers, name: str, command: Command, help: str
) -> argparse.ArgumentParser:
    description = help[0].upper() + help[1:] + "."
    parser = commands.add_parser(name, help=help, description=description)
    parser.set_defaults(command=command)
    parser.add_argument(
        "--store",
        default=os.environ.get(STORE_VARIABLE) or DEFAULT_STORE,
        help="directory, or s3://bucket/prefix, gs://… or az://… "
        f"(default: ${STORE_VARIABLE}, else {DEFAULT_STORE})",
    )
    return parser


def _add_name(parser: argparse.ArgumentParser, help: str = "name in the store") -> None:
    parser.add_argument("name", help=help)


def _add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "version", nargs="?", default=LATEST, help="number or latest (default: %(default)s)"
    )


def _parse_positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


# ---------------------------------------------------------------------------------------------
# Commands: each takes the parsed arguments and returns the exit status


def run_list(options: Options) -> int:
    """Print a table of all versions. The row of a broken bundle names the reason."""
    store = Store(options.store)
    header = (
        "NAME",
        "VERSION",
        "CREATED",
        "NETWORK",
        "ACCURACY",
        "BALANCED",
        "MAJORITY",
        "VARIANTS",
        "",
    )
    rows: list[tuple[str, ...]] = [header]
    for name in store.names():
        latest = store.latest(name)
        for version in store.versions(name):
            rows.append(_list_row(store, name, version, is_latest=version == latest))
    _print_table(rows)
    return 0


def _list_row(store: Store, name: str, version: int, is_latest: bool) -> tuple[str, ...]:
    try:
        manifest = store.read_manifest(name, version)
    except StoreError:
        raise
    except BundleError as error:
        unknown = ("-",) * 6
        return (name, str(version), *unknown, f"unreadable: {error}")

    return (
        name,
        str(version),
        _format_date(manifest.created),
        manifest.network,
        *_format_accuracies(manifest),
        " ".join(manifest.variants),
        LATEST if is_latest else "",
    )


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    columns = zip(*rows, strict=True)
    widths = [max(map(len, column)) for column in columns]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())


def run_show(options: Options) -> int:
    """Print the main facts of one bundle, or its manifest as JSON."""
    manifest = Store(options.store).read_manifest(options.name, options.version)
    if options.json:
        print(manifest.model_dump_json(indent=1))
        return 0

    input_spec = manifest.input
    print(
        f"{manifest.name}/{manifest.version}  {manifest.network}, {len(manifest.classes)} classes, "
        f"{input_spec.height}x{input_spec.width}x{input_spec.channels}, "
        f"created {_format_date(manifest.created)}"
    )
    accuracy, balanced, majority = _format_accuracies(manifest)
    print(f"  test       accuracy {accuracy}, balanced {balanced}, majority class {majority}")
    for name, variant in manifest.variants.items():
        print(f"  {name:9s}  {_format_variant(variant)}")

    for name, variant in manifest.variants.items():
        if variant.calibration is not None:
            print(f"  calibrated {name}: {_format_calibration(variant.calibration)}")
    print(f"  calibrated {_format_calibration(manifest.calibration)}")

    provenance = manifest.provenance
    commit = (provenance.git_commit or "unknown")[:12]
    dirty = " (dirty)" if provenance.git_dirty else ""
    print(
        f"  from       {provenance.data.source}, commit {commit}{dirty}, "
        f"seed {provenance.seed}, {provenance.device}"
    )
    for note in manifest.notes:
        print(f"  note       {note}")
    return 0


def run_verify(options: Options) -> int:
    """Verify a bundle on this machine and print what was measured."""
    path = Path(options.name)
    if not path.is_dir():
        path = Store(options.store).path(options.name, options.version)

    report = verify_bundle(path, options.public_key)
    _print_report(report)
    return 1 if report.problems else 0


def _print_report(report: BundleReport) -> None:
    manifest = report.bundle.manifest
    title = f"{manifest.name}/{manifest.version}"
    print(
        f"{title}  checksums match, signed: {report.signed}; {len(manifest.samples)} samples "
        f"decode within {report.samples.pixel_diff:.2g} of 255"
    )
    for variant in report.variants:
        print(f"  {_format_variant_report(variant)}")
        if manifest.calibration_of(variant.variant).always_abstains:
            print(
                f"  {variant.variant:5s} abstains on every image: no threshold is accurate enough"
            )

    if report.problems:
        print(f"FAILED: {'; '.join(report.problems)}")
    else:
        print(f"ok: {title} reproduces its expected outputs on this machine")


def run_compare(options: Options) -> int:
    """Compare two bundles, print the results, and write a page and JSON where asked for."""
    if options.html and not options.html.parent.is_dir():
        raise BundleError(f"--html {options.html}: no such directory")
    try:
        budgets = GateConfig(
            accuracy=options.accuracy,
            class_recall=options.class_recall,
            calibration=options.calibration,
            latency=options.latency,
            confidence=options.confidence,
            images=options.images,
            live_images=options.live_images,
        )
    except ValueError as error:
        raise BundleError(str(error).replace("gate.", "--").replace("_", "-")) from error

    old = _open_named(options.old, options.store)
    new = _open_named(options.new, options.store)
    chosen = choose_images_of_bundles(old, new, options.data)
    comparison = compare_candidates(
        open_candidate(old, options.old_variant),
        open_candidate(new, options.new_variant),
        limit_images(chosen.images, budgets.images),
        budgets.confidence,
        chosen.notes,
    )
    comparison.gate = decide(comparison, budgets)

    if options.html:
        options.html.write_text(render_page(comparison), encoding="utf-8")
    is_json_on_stdout = options.json == Path("-")
    if options.json:
        text = comparison.to_json()
        if is_json_on_stdout:
            print(text, end="")
        else:
            options.json.write_text(text, encoding="utf-8")
    if not is_json_on_stdout:
        print("\n".join(describe_comparison(comparison)))
    return 0 if comparison.gate.passed else 1


def _open_named(text: str, store: str) -> Bundle:
    """Open a bundle by the path of its directory, or by NAME or NAME/VERSION in a store."""
    path = Path(text)
    if path.is_dir():
        return Bundle(path)
    name, _, version = text.partition("/")
    return Store(store).open(name, version or LATEST)


def run_sign(options: Options) -> int:
    """Sign a bundle after checking it."""
    from models.bundle.signing import sign_bundle

    store = Store(options.store)
    bundle = store.open(options.name, options.version)
    version = bundle.manifest.version
    sign_bundle(bundle.path, options.key)
    store.save_signature(options.name, version)
    print(f"signed {store.location_of(options.name, version)}")
    return 0


def run_promote(options: Options) -> int:
    """Point latest at a version after checking it."""
    store = Store(options.store)
    if not options.version.isdecimal():
        raise BundleError(f"can't promote {options.version!r}; give a number")
    gate = store.open(options.name, options.version).manifest.gate
    if gate is not None and not gate.passed and not options.force:
        raise BundleError(
            f"{options.name}/{options.version} is refused by the gate, compared with version "
            f"{gate.compared_with}: {'; '.join(gate.reasons)}; promote it anyway with --force"
        )
    store.promote(options.name, int(options.version))
    print(f"{options.name}: latest is {options.version}")
    return 0


def run_rollback(options: Options) -> int:
    """Point latest at the version before it."""
    version = Store(options.store).rollback(options.name)
    print(f"{options.name}: latest is {version}")
    return 0


def run_prune(options: Options) -> int:
    """Delete old versions and print their numbers."""
    deleted = Store(options.store).prune(options.name, options.keep)
    print(f"{options.name}: deleted {', '.join(map(str, deleted)) or 'nothing'}")
    return 0


def run_push(options: Options) -> int:
    """Copy a bundle to another store and print where it is."""
    source = Store(options.store)
    target = Store(options.url)
    location, is_copied = copy_version(
        source, options.name, options.version, target, not options.no_promote
    )
    print(f"{'pushed to' if is_copied else 'already at'} {location}")
    return 0


def run_pull(options: Options) -> int:
    """Copy a bundle from another store and print where it is."""
    version = options.version
    if version != LATEST and not version.isdecimal():
        raise BundleError(
            f"can't pull version {version!r} of {options.name}; give a number or latest"
        )
    source = Store(options.url)
    target = Store(options.store)
    location, is_copied = copy_version(
        source, options.name, version, target, not options.no_promote
    )
    print(f"{'pulled to' if is_copied else 'already at'} {location}")
    return 0


# ---------------------------------------------------------------------------------------------
# Formatting


def _format_accuracies(manifest: Manifest) -> tuple[str, str, str]:
    """Return the test accuracy, the balanced one, and that of always the largest class."""
    metrics = manifest.test_metrics
    if metrics is None:
        return ("-", "-", "-")
    return (
        _format_share(metrics.accuracy),
        _format_share(metrics.balanced_accuracy),
        _format_share(metrics.majority_accuracy),
    )


def _format_variant(variant: Variant) -> str:
    speed = _format_latency(variant.latency) if variant.latency else "not timed"
    return (
        f"{variant.bytes / 1e6:.2f} MB, accuracy {_format_share(variant.accuracy)}, "
        f"{speed}, opset {variant.opset}"
    )


def _format_calibration(calibration: Calibration) -> str:
    abstains = "never abstains"
    if calibration.always_abstains:
        abstains = "abstains on every image"
    elif calibration.abstain_threshold:
        abstains = f"abstains below {calibration.abstain_threshold:.3f}"
    return f"temperature {calibration.temperature:.3f}, {abstains}"


def _format_latency(latency: Latency) -> str:
    images_per_second = latency.images_per_second
    per_core = images_per_second / latency.threads
    return f"{images_per_second:.0f} images/s ({per_core:.0f} per core, {latency.threads} cores)"


def _format_variant_report(report: VariantReport) -> str:
    comparison = report.comparison
    single = report.batch_ms[1]
    eight = report.batch_ms[8]
    return (
        f"{report.variant:5s} max |dp| {comparison.max_abs_diff:.1e} "
        f"({report.tolerance:.1e} allowed), {100 * comparison.agreement:.0f} % same labels; "
        f"batch 1 {single:.2f} ms, batch 8 {eight:.2f} ms ({8000 / eight:.0f} images/s)"
    )


def _format_share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _format_date(created: datetime) -> str:
    return created.strftime("%Y-%m-%d %H:%M")


if __name__ == "__main__":
    sys.exit(main())
