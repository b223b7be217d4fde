"""`python -m models`: look at bundles, check them, and move them between stores. Never imports torch."""

import argparse
import sys
from datetime import datetime
from pathlib import Path

from models.bundle import Bundle, BundleError, Latency
from models.bundle.verify import Check, check_bundle
from models.store import LATEST, Store
from models.store.remote import pull, push


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a bundle that does not pass `verify`, 2 anything asked for that can't be done."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except BundleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if options.run is verify else 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m models", description=__doc__.split("`: ")[1])
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        run, help: str, *, name: str = "", version: str | None = None
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            run.__name__.rstrip("_"), help=help, description=help[0].upper() + help[1:] + "."
        )
        sub.set_defaults(run=run)
        if name:
            sub.add_argument("name", help=name)
        if version is not None:
            sub.add_argument(
                "version",
                nargs="?",
                default=version or None,
                help="a number or latest (%(default)s)",
            )
        sub.add_argument(
            "--store", type=Path, default=Path("artifacts/store"), help="directory (%(default)s)"
        )
        return sub

    command(list_, "names, versions and what they score")
    sub = command(show, "one bundle's manifest in brief", name="name in the store", version=LATEST)
    sub.add_argument("--json", action="store_true", help="the manifest itself")
    sub = command(
        verify,
        "check digests, graphs and answers of a bundle on this machine; exit status 0 or 1",
        name="a bundle's directory, or a name in the store",
        version=LATEST,
    )
    sub.add_argument(
        "--public-key", type=Path, help="PEM file; the bundle must be signed with its other half"
    )
    sub = command(sign, "sign a bundle with a key file", name="name in the store", version=LATEST)
    sub.add_argument(
        "--key", type=Path, required=True, help="PEM file of an elliptic curve private key"
    )
    sub = command(promote, "point latest at a version", name="name in the store")
    sub.add_argument("version", help="a number")
    command(rollback, "point latest at the version before it", name="name in the store")
    sub = command(
        prune, "delete old versions, never latest nor the one before it", name="name in the store"
    )
    sub.add_argument(
        "--keep", type=_positive, default=3, help="newest versions to keep (%(default)s)"
    )
    for run, direction in ((push_, "to"), (pull_, "from")):
        sub = command(
            run,
            f"copy a bundle {direction} another store, digests checked",
            name="name",
            version=LATEST,
        )
        sub.add_argument(
            "url", help="any URL that fsspec knows: s3://bucket/store, gs://…, file:///…"
        )
        sub.add_argument("--no-promote", action="store_true", help="leave latest where it is")
    return top


def list_(options) -> int:
    store = Store(options.store)
    rows = [("NAME", "VERSION", "CREATED", "NETWORK", "ACCURACY", "VARIANTS", "")]
    for name in store.names():
        for version in store.versions(name):
            latest = "latest" if version == store.latest(name) else ""
            try:
                bundle = store.open(name, version, verify=False)
            except BundleError as error:
                rows.append((name, str(version), "-", "-", "-", "-", f"unreadable: {error}"))
                continue
            m = bundle.manifest
            rows.append(
                (
                    name,
                    str(version),
                    _day(m.created),
                    m.network,
                    _accuracy(bundle),
                    " ".join(m.variants),
                    latest,
                )
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    return 0


def show(options) -> int:
    bundle = Store(options.store).open(options.name, options.version, verify=False)
    m = bundle.manifest
    if options.json:
        print(m.model_dump_json(indent=1))
        return 0
    c, p = m.calibration, m.provenance
    print(
        f"{m.name}/{m.version}  {m.network}, {len(m.classes)} classes, "
        f"{m.input.height}x{m.input.width}x{m.input.channels}, made {_day(m.created)}"
    )
    print(f"  test       accuracy {_accuracy(bundle)}")
    for name, v in m.variants.items():
        speed = _speed(v.latency) if v.latency else "not timed"
        accuracy = "-" if v.accuracy is None else f"{100 * v.accuracy:.2f} %"
        print(f"  {name:9s}  {v.bytes / 1e6:.2f} MB, accuracy {accuracy}, {speed}, opset {v.opset}")
    print(f"  answers    temperature {c.temperature:.3f}, abstains below {c.abstain_threshold:.3f}")
    dirty = " (dirty)" if p.git_dirty else ""
    print(
        f"  from       {p.data.source}, commit {(p.git_commit or 'unknown')[:12]}{dirty}, seed {p.seed}, {p.device}"
    )
    for note in m.notes:
        print(f"  note       {note}")
    return 0


def verify(options) -> int:
    path = Path(options.name)
    if not path.is_dir():
        path = Store(options.store).path(options.name, options.version)
    check = check_bundle(path, options.public_key)
    print("\n".join(_lines(check)))
    return 1 if check.problems else 0


def _lines(check: Check) -> list[str]:
    m = check.bundle.manifest
    lines = [
        f"{m.name}/{m.version}  digests fit, signed: {check.signed}; "
        f"{len(m.samples)} samples decode within {check.samples.pixel_diff:.2g} of 255"
    ]
    for c in check.variants:
        one, eight = c.batch_ms[1], c.batch_ms[8]
        lines.append(
            f"  {c.variant:5s} max |dp| {c.verdict.max_abs_diff:.1e} ({c.tolerance:.1e} allowed), "
            f"{100 * c.verdict.agreement:.0f} % same labels; "
            f"batch 1 {one:.2f} ms, batch 8 {eight:.2f} ms ({8000 / eight:.0f} images/s)"
        )
    verdict = "; ".join(check.problems)
    return [
        *lines,
        f"FAILED: {verdict}"
        if verdict
        else f"ok: {m.name}/{m.version} does here what it did when made",
    ]


def sign(options) -> int:
    from models.bundle.signing import sign_bundle

    bundle = Store(options.store).open(options.name, options.version)
    sign_bundle(bundle.path, options.key)
    print(f"signed {bundle.path}")
    return 0


def promote(options) -> int:
    store = Store(options.store)
    if not options.version.isdecimal():
        raise BundleError(f"{options.version!r} is no version to promote: give a number")
    store.open(options.name, options.version)  # whole, or nobody is sent there
    store.promote(options.name, int(options.version))
    print(f"{options.name}: latest is {options.version}")
    return 0


def rollback(options) -> int:
    print(f"{options.name}: latest is {Store(options.store).rollback(options.name)}")
    return 0


def prune(options) -> int:
    gone = Store(options.store).prune(options.name, options.keep)
    print(f"{options.name}: deleted {', '.join(map(str, gone)) or 'nothing'}")
    return 0


def push_(options) -> int:
    where, copied = push(
        Store(options.store), options.name, options.version, options.url, not options.no_promote
    )
    print(f"{'pushed to' if copied else 'already at'} {where}")
    return 0


def pull_(options) -> int:
    bundle, copied = pull(
        Store(options.store), options.name, options.version, options.url, not options.no_promote
    )
    print(f"{'pulled to' if copied else 'already at'} {bundle.path}")
    return 0


def _accuracy(bundle: Bundle) -> str:
    metrics = bundle.manifest.metrics.get("test")
    return f"{100 * metrics.accuracy:.2f} %" if metrics else "-"


def _speed(latency: Latency) -> str:
    rate = latency.images_per_second
    return f"{rate:.0f} images/s ({rate / latency.threads:.0f} a core of {latency.threads})"


def _day(created: datetime) -> str:
    return created.strftime("%Y-%m-%d %H:%M")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
