"""The other servers that serve_speed.py and serve_curves.py measure in turn with Imago.

    python tests/benchmarks/serve_rivals.py [litserve fastapi mlserver ray bentoml]
        --environments DIR

starts each server once with the same ONNX file and compares its answer with that of onnxruntime.
mlserver, ray and bentoml are installed first, each into a virtual environment DIR/NAME of its own;
one that can't be installed is left out with a line. `--serve PORT MODEL.onnx MANIFEST.json` runs
one server with the packages of the Python that it is called with.

Each is set up as its documentation says; its module in rivals/ has the details:

| server | image in a request | processes that predict | batches |
| --- | --- | --- | --- |
| litserve | base64 in JSON | 1 worker, 1 API process | 16, waits 2 ms |
| fastapi | raw bytes | 1, threads of Starlette's pool | none |
| mlserver | base64 in a BYTES tensor | 1 inference worker, 1 server | 16, waits 2 ms |
| ray | raw bytes | 1 replica with all cores, 1 proxy | 16, waits 2 ms |
| bentoml | base64 in a JSON list | 1 worker | 16, adaptive wait |

All decode with the project's code and run the graph in one session over all cores. The variables
BATCH and BATCH_SECONDS change the two numbers.
"""

import argparse
import base64
import importlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
import venv
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import project_path  # noqa: F401  makes `models` importable
from rivals.graph import GRAPH_VARIABLE, MANIFEST_VARIABLE, Graph
from serving import RunningServer, find_free_port, running_server

SHARED_PACKAGES = ("opencv-python-headless", "numpy", "pydantic")
"""Installed with each server, besides the version of onnxruntime that Imago uses here."""
DEFAULT_RIVALS = ["litserve", "fastapi"]
"""Those whose packages Imago's tests have already."""


def encode(image: bytes) -> str:
    return base64.b64encode(image).decode()


def build_raw_body(image: bytes) -> bytes:
    return image


def build_litserve_body(image: bytes) -> bytes:
    return json.dumps({"image": encode(image)}).encode()


def build_bentoml_body(image: bytes) -> bytes:
    return json.dumps({"images": [encode(image)]}).encode()


def build_mlserver_body(image: bytes) -> bytes:
    tensor = {
        "name": "image",
        "shape": [1, 1],
        "datatype": "BYTES",
        "parameters": {"content_type": "base64"},
        "data": [encode(image)],
    }
    return json.dumps({"inputs": [tensor]}).encode()


def read_label(answer: Any) -> int:
    return answer["label"]


def read_bentoml_label(answer: Any) -> int:
    return answer[0]["label"]


def read_mlserver_label(answer: Any) -> int:
    return answer["outputs"][0]["data"][0]


@dataclass(frozen=True)
class Rival:
    """How to install a server, and how to talk to it."""

    module: str
    """In rivals/; its function `run` serves on a port."""
    packages: tuple[str, ...] = ()
    """To install into an environment of its own, the server first; none: this Python has it."""
    path: str = "/predict"
    health: str = "/health"
    content_type: str = "application/json"
    build_body: Callable[[bytes], bytes] = build_raw_body
    read_label: Callable[[Any], int] = read_label


RIVALS = {
    "litserve": Rival("litserve_api", build_body=build_litserve_body),
    "fastapi": Rival("fastapi_app", content_type="image/jpeg"),
    "mlserver": Rival(
        "mlserver_model",
        ("mlserver", "uvloop<0.22"),  # a worker of 1.7.1 does not start with later ones
        path="/v2/models/images/infer",
        health="/v2/models/images/ready",
        build_body=build_mlserver_body,
        read_label=read_mlserver_label,
    ),
    "ray": Rival("ray_app", ("ray[serve]",), health="/predict", content_type="image/jpeg"),
    "bentoml": Rival(
        "bentoml_service",
        ("bentoml",),
        health="/readyz",
        build_body=build_bentoml_body,
        read_label=read_bentoml_label,
    ),
}


def prepare_python(kind: str, environments: Path | None) -> str | None:
    """Return the Python that runs a server; install the server first where it is missing.

    Prints why and returns None where that is not possible.
    """
    packages = RIVALS[kind].packages
    if not packages:
        return sys.executable
    if environments is None:
        print(f"{kind} left out: name a folder for its packages with --environments", flush=True)
        return None

    directory = environments.absolute() / kind
    python = directory / "bin/python"
    installed = directory / "installed.txt"
    if not installed.exists():
        try:
            venv.create(directory, with_pip=True, clear=True)
        except (OSError, subprocess.CalledProcessError) as error:  # such as: no ensurepip
            print(f"{kind} left out: {error}", flush=True)
            return None
        shared = [f"onnxruntime=={version('onnxruntime')}", *SHARED_PACKAGES]
        pip = [str(python), "-m", "pip", "install", "--quiet", *packages, *shared]
        process = subprocess.run(pip, capture_output=True, text=True)
        if process.returncode:
            lines = process.stderr.strip().splitlines() or ["pip failed"]
            print(f"{kind} left out: {lines[-1]}", flush=True)
            return None
        freeze = [str(python), "-m", "pip", "freeze"]
        installed.write_text(subprocess.check_output(freeze, text=True))
    return str(python)


def prepare_rivals(kinds: list[str], environments: Path | None) -> dict[str, str]:
    """Return the Python of each server that can run here."""
    pythons: dict[str, str] = {}
    for kind in kinds:
        python = prepare_python(kind, environments)
        if python is not None:
            pythons[kind] = python
    return pythons


def read_version(kind: str, python: str) -> str:
    """The version of a server's package."""
    packages = RIVALS[kind].packages or (kind,)
    code = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    return subprocess.check_output(
        [python, "-c", code, packages[0].partition("[")[0]], text=True
    ).strip()


def start_rival(
    stack: ExitStack, kind: str, python: str, graph: Path, manifest: Path
) -> RunningServer:
    """Start a server, which ends with the stack."""
    port = find_free_port()
    command = [__file__, kind, "--serve", str(port), str(graph), str(manifest)]
    context = running_server(command, port, RIVALS[kind].health, python)
    return RunningServer(stack.enter_context(context), port)


def check_answer(
    kind: str, server: RunningServer, image: bytes, graph: Path, manifest: Path
) -> None:
    """Raise ValueError if a server answers another class than onnxruntime."""
    rival = RIVALS[kind]
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}{rival.path}",
        rival.build_body(image),
        {"Content-Type": rival.content_type},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        label = rival.read_label(json.load(response))

    os.environ[GRAPH_VARIABLE] = str(graph)
    os.environ[MANIFEST_VARIABLE] = str(manifest)
    reference = Graph()
    probabilities = reference.run(reference.decode(image)[None])
    expected = int(np.argmax(probabilities))
    if label != expected:
        raise ValueError(f"{kind} answers class {label}, onnxruntime {expected}")


def serve(kind: str, port: int, graph: str, manifest: str) -> None:
    """Run a server until it is stopped."""
    os.environ[GRAPH_VARIABLE] = graph
    os.environ[MANIFEST_VARIABLE] = manifest
    # Servers start processes of their own, which import the modules of this folder as well.
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    importlib.import_module(f"rivals.{RIVALS[kind].module}").run(port)


def check_rivals(kinds: list[str], environments: Path | None) -> bool:
    """Install and start each server once, and print a line for each. Return whether all answer."""
    from serve_models import make_jpeg, publish

    pythons = prepare_rivals(kinds, environments)
    if not pythons:
        return False
    image = make_jpeg(32, 32)
    with tempfile.TemporaryDirectory() as directory:
        bundle = publish(Path(directory), "tiny")
        files = (bundle / "model.onnx", bundle / "manifest.json")
        for kind, python in pythons.items():
            with ExitStack() as stack:
                server = start_rival(stack, kind, python, *files)
                check_answer(kind, server, image, *files)
            print(f"{kind} {read_version(kind, python)} answers as onnxruntime does", flush=True)
    return len(pythons) == len(kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", choices=list(RIVALS), default=list(RIVALS))
    parser.add_argument("--environments", type=Path, help="folder for a server's packages")
    parser.add_argument(
        "--serve", nargs=3, metavar=("PORT", "GRAPH", "MANIFEST"), help="run one server"
    )
    options = parser.parse_args()
    if options.serve:
        port, graph, manifest = options.serve
        serve(options.kinds[0], int(port), graph, manifest)
        return
    sys.exit(0 if check_rivals(options.kinds, options.environments) else 1)


if __name__ == "__main__":
    main()
