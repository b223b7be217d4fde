"""Fuzz the parsers of untrusted bytes, guided by the code that each input reaches (atheris).

    python -m venv --system-site-packages fuzz && fuzz/bin/pip install atheris
    fuzz/bin/python tests/reliability/fuzz_parsers.py [--minutes 10] [--targets header multipart …]
        [--seed 0] [--findings DIR] [--out FILE]

Each target runs for MINUTES in a process of its own, from a corpus of valid inputs. A finding is an
exception that the parser does not document, an input that takes more than 5 seconds, or more than 2
GiB of memory. The input is kept in DIR.

Prints the report as JSON, which FILE keeps: the inputs that were run and the findings of each
target. Exit status 1 where there are findings, 2 without atheris.
"""

import argparse
import base64
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import project_path  # noqa: F401  makes the imports below possible
from reports import describe_run, print_report

from support.image_mutations import write_seed_images

SECONDS_PER_INPUT = 5
MEMORY_MB = 2048
MAX_INPUT_BYTES = 1 << 16
MAX_IMAGES = 64
EXECUTED_UNITS = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
SPEC = {"height": 32, "width": 32, "channels": 3}
BOUNDARY = b"multipart/form-data; boundary=b"
Target = Callable[[bytes], object]


def build_targets() -> dict[str, Target]:
    """Import the parsers with instrumentation and return a function for each target."""
    import atheris

    instrumented = ["models.image", "models.bundle", "models.kept", "models.labelling"]
    instrumented += ["serve.http", "serve.wire"]
    with atheris.instrument_imports(include=instrumented):
        from models.bundle import BundleError
        from models.bundle.manifest import parse_manifest
        from models.image import ImageError, read_header
        from models.image.sanitize import sanitize
        from models.kept.records import KeptImage, merge_images, parse_lines
        from models.labelling.app import LabelProblem, parse_body, parse_labels
        from serve.http import open_inference, predict_endpoint, request_body
        from serve.http.feedback import parse_feedback
        from serve.http.responses import Problem
        from serve.wire import take_answers, take_jobs

    def read_image(data: bytes) -> object:
        return sanitize(data, read_header(data))

    def read_frames(data: bytes) -> object:
        return take_jobs(bytearray(data)), take_answers(bytearray(data))

    def read_kept_lines(data: bytes) -> object:
        images = merge_images(parse_lines(data, KeptImage))
        return [image.read_embedding() for image in images.values()]

    parsers: dict[str, Target] = {
        "header": read_header,
        "sanitize": read_image,
        "multipart": lambda data: request_body.parse_images(data, BOUNDARY, MAX_IMAGES),
        "json": lambda data: request_body.parse_images(data, b"application/json", MAX_IMAGES),
        "inference": lambda data: open_inference.parse_inference(data, {}, SPEC, MAX_IMAGES),
        "feedback": parse_feedback,
        "query": predict_endpoint.parse_query,
        "frames": read_frames,
        "labels": lambda data: parse_labels(parse_body(data)),
        "kept": read_kept_lines,
        "manifest": lambda data: parse_manifest(data, "fuzz"),
    }
    expected = (ImageError, Problem, LabelProblem, BundleError)
    return {name: _ignore(parser, expected) for name, parser in parsers.items()}


def _ignore(parser: Target, expected: tuple[type[Exception], ...]) -> Target:
    def run(data: bytes) -> object:
        try:
            return parser(data)
        except expected:
            return None

    return run


TARGETS = (
    "header",
    "sanitize",
    "multipart",
    "json",
    "inference",
    "feedback",
    "query",
    "frames",
    "labels",
    "kept",
    "manifest",
)


def write_corpus(target: str, directory: Path) -> None:
    """Write valid inputs of a target, one a file."""
    seeds = write_seed_images()
    images = [image for files in seeds.values() for image in files]
    text = base64.b64encode(images[0]).decode()
    part = b'--b\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\n'
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [text]}
    inputs: dict[str, list[bytes]] = {
        "header": images,
        "sanitize": images,
        "multipart": [part + images[0] + b"\r\n--b--\r\n"],
        "json": [json.dumps({"images": [text]}).encode()],
        "inference": [json.dumps({"inputs": [tensor]}).encode()],
        "feedback": [b'{"id": "a", "label": "b", "image": 0}'],
        "query": [b"top_k=3&explain=cam&embedding=base64"],
        "frames": [bytes(64)],
        "labels": [
            b'{"labels": [{"id": "a", "verdict": "class", "label": "red", "who": "ann"}]}',
        ],
        "kept": _write_kept_lines(directory.with_name("kept-files")) if target == "kept" else [],
        "manifest": _write_manifest(directory.with_name("store")) if target == "manifest" else [],
    }
    directory.mkdir()
    for number, content in enumerate(inputs[target]):
        (directory / str(number)).write_bytes(content)


# The imports are in the functions: what a child fuzzes must be imported with instrumentation.


def _write_kept_lines(root: Path) -> list[bytes]:
    from models.kept import open_kept
    from support.kept_images import add_answered_image

    add_answered_image(open_kept(root))
    return [path.read_bytes() for path in root.glob("*/*.jsonl")]


def _write_manifest(store: Path) -> list[bytes]:
    from support import tiny_bundle

    return [(tiny_bundle.publish(store) / "manifest.json").read_bytes()]


def run_child(target: str, corpus: Path, findings: Path, seconds: int, seed: int) -> None:
    """Fuzz one target in this process, which libFuzzer ends."""
    import atheris

    flags = [
        f"-max_total_time={seconds}",
        f"-timeout={SECONDS_PER_INPUT}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-max_len={MAX_INPUT_BYTES}",
        f"-seed={seed + 1}",
        f"-artifact_prefix={findings}/{target}-",
        "-print_final_stats=1",
    ]
    function = build_targets()[target]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], function)
    atheris.Fuzz()


def fuzz_target(target: str, options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    corpus = directory / target
    write_corpus(target, corpus)
    command = [sys.executable, __file__, "--child", target, "--corpus", str(corpus)]
    flags = ["--minutes", str(options.minutes), "--seed", str(options.seed)]
    flags += ["--findings", str(options.findings)]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, errors="replace")

    executed = EXECUTED_UNITS.search(done.stderr)
    result: dict[str, Any] = {"inputs": int(executed[1]) if executed is not None else 0}
    if done.returncode != 0 or executed is None:
        result["finding"] = done.stderr[-2000:]
    return result


def has_atheris() -> bool:
    try:
        return importlib.util.find_spec("atheris") is not None
    except ValueError:  # its import is blocked
        return False


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="for each target")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("artifacts/fuzz-parsers"))
    parser.add_argument("--out", type=Path, help="file for the report")
    parser.add_argument("--child", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)

    if not has_atheris():
        print("error: atheris is not installed; run pip install atheris", file=sys.stderr)
        return 2
    options.findings.mkdir(parents=True, exist_ok=True)
    seconds = max(1, round(60 * options.minutes))
    if options.child:
        run_child(options.child, options.corpus, options.findings, seconds, options.seed)
        return 0

    with TemporaryDirectory() as directory:
        results = {name: fuzz_target(name, options, Path(directory)) for name in options.targets}
    violations = [name for name, result in results.items() if "finding" in result]
    report = {
        **describe_run(),
        "minutes": options.minutes,
        "seed": options.seed,
        "targets": results,
        "violations": violations,
    }
    return print_report(report, options.out)


if __name__ == "__main__":
    sys.exit(main())
