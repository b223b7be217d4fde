"""Compare the service with onnxruntime alone on the same cores, and with other ways to serve.

    python tests/benchmarks/serve_speed.py [small-int8 small-fp32 large-fp32 large-int8 tiny]
        [--rounds 3] [--seconds 3] [--rivals litserve fastapi mlserver ray bentoml]
        [--environments DIR] [--keep]

The client (wrk) shares the cores with the server. The limit is therefore measured without it, with
one thread and a one-thread session per core on the best batch size, and multiplied by the share of
the cores that the client left in the round it is compared with:
`limit * (1 - client's CPU seconds / (cores * seconds))`. For photos (large) each thread of the
limit also decodes what it runs. Rounds alternate between limit, service and rivals; the medians of
the rounds' ratios are printed, one JSON line a case: `of_limit`; `of_limit_cpu`, the same by CPU
seconds per image, which other load on the machine disturbs less; throughput and p99 against
the other servers (serve_rivals.py tells how they are set up and installed; those that are not
installed are left out with a line). --keep also writes the lines into
serve_speed.json in this folder.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from results import spread, write_result
from serve_models import make_jpeg, publish
from serve_rivals import (
    DEFAULT_RIVALS,
    RIVALS,
    check_answer,
    prepare_rivals,
    read_version,
    start_rival,
)
from serving import (
    CORES,
    LoadResult,
    measure_load,
    resumed,
    running_service,
    suspend,
    write_wrk_script,
)

from models.bundle import MANIFEST_FILE, read_manifest
from models.image import decode

OUTPUTS = ["probabilities", "energy"]
WARM_UP_SECONDS = 1
SMALL_BATCHES = (8, 16)
PHOTO_BATCHES = (4, 8, 16)
NO_TIMEOUT = ("--worker-timeout-seconds", "600")
"""A suspended worker must not be taken for a hung one."""


class BareRuntime:
    """onnxruntime alone: a thread per core, all with one session, each on its own batch."""

    def __init__(
        self, path: Path, image: bytes, decodes: bool, batch: int, threads: int = 1
    ) -> None:
        """`decodes`: whether each run decodes its images first; `threads`: of the session."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self.spec = read_manifest(path.parent).input
        self.image = image
        self.decodes = decodes
        self.batch = batch
        self.images = self._decode_batch()

    def _decode_batch(self) -> np.ndarray:
        return np.stack([decode(self.image, self.spec) for _ in range(self.batch)])

    def run_batch(self) -> None:
        images = self._decode_batch() if self.decodes else self.images
        self.session.run(OUTPUTS, {"image": images})

    def measure_rate(self, seconds: float) -> tuple[float, float]:
        """Return images per second and CPU seconds per image."""
        counts = [0] * CORES
        end = time.perf_counter() + seconds

        def run_batches(core: int) -> None:
            while time.perf_counter() < end:
                self.run_batch()
                counts[core] += self.batch

        threads = [threading.Thread(target=run_batches, args=(core,)) for core in range(CORES)]
        started = time.perf_counter()
        cpu_before = time.process_time()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        images = sum(counts)
        rate = images / (time.perf_counter() - started)
        return rate, (time.process_time() - cpu_before) / images


@dataclass
class Round:
    """One measurement of everything."""

    limit: float
    """Images per second of onnxruntime alone."""
    limit_cpu: float
    """CPU seconds per image of onnxruntime alone."""
    loads: dict[str, LoadResult]
    """Of the service and of each rival."""

    @property
    def service(self) -> LoadResult:
        return self.loads["service"]


def measure_case(
    store: Path, name: str, rounds: int, seconds: float, rivals: dict[str, str]
) -> dict:
    """Measure a case, e.g. small-int8; return its line. `rivals` has the Python of each."""
    model, _, variant = name.partition("-")
    variant = variant or "fp32"
    bundle = publish(store, model)
    graph = bundle / read_manifest(bundle).variants[variant].file

    is_photo = model == "large"
    image = make_jpeg(375, 500) if is_photo else make_jpeg(32, 32)
    scripts = write_scripts(store, image, list(rivals))
    bare = choose_bare_runtime(graph, image, is_photo)

    with ExitStack() as stack:
        flags = ("--variant", variant, *NO_TIMEOUT)
        servers = {"service": stack.enter_context(running_service(store, model, *flags))}
        manifest = bundle / MANIFEST_FILE
        for rival, python in rivals.items():
            servers[rival] = start_rival(stack, rival, python, graph, manifest)
            check_answer(rival, servers[rival], image, graph, manifest)
        for kind, server in servers.items():
            measure_load(server, scripts[kind], WARM_UP_SECONDS)
            suspend(server)

        measured: list[Round] = []
        for _ in range(rounds):
            limit, limit_cpu = bare.measure_rate(seconds)
            loads: dict[str, LoadResult] = {}
            for kind, server in servers.items():
                with resumed(server):
                    loads[kind] = measure_load(server, scripts[kind], seconds)
            measured.append(Round(limit, limit_cpu, loads))
    line = summarize(name, bare.batch, measured, list(rivals))
    line["rivals"] = {kind: read_version(kind, python) for kind, python in rivals.items()}
    return line


def write_scripts(directory: Path, image: bytes, rivals: list[str]) -> dict[str, Path]:
    """The wrk script for each server, with the request that it takes."""
    scripts = {"service": write_wrk_script(directory, image)}
    for kind in rivals:
        rival = RIVALS[kind]
        folder = directory / f"requests-{kind}"
        folder.mkdir(exist_ok=True)
        body = rival.build_body(image)
        scripts[kind] = write_wrk_script(folder, body, rival.content_type, rival.path)
    return scripts


def choose_bare_runtime(graph: Path, image: bytes, is_photo: bool) -> BareRuntime:
    """The fastest batch size of onnxruntime alone."""
    batches = PHOTO_BATCHES if is_photo else SMALL_BATCHES
    runtimes = [BareRuntime(graph, image, is_photo, batch) for batch in batches]
    return max(runtimes, key=lambda runtime: runtime.measure_rate(WARM_UP_SECONDS)[0])


def summarize(name: str, batch: int, rounds: list[Round], rivals: list[str]) -> dict:
    """The medians over the rounds."""

    def median(value: Callable[[Round], float]) -> float:
        return round(statistics.median(value(each) for each in rounds), 3)

    line = {
        "case": name,
        "cores": CORES,
        "bare_batch": batch,
        "bare": median(lambda r: r.limit),
        "service": median(lambda r: r.service.rate),
        "client_share": median(lambda r: r.service.client),
        "of_limit": median(lambda r: r.service.rate / (r.limit * (1 - r.service.client))),
        "of_limit_raw": median(lambda r: r.service.rate / r.limit),
        "of_limit_cpu": median(lambda r: r.limit_cpu / r.service.cpu),
        "p99_ms": median(lambda r: r.service.p99),
        "spread": {
            "service": spread([each.service.rate for each in rounds]),
            "p99_ms": spread([each.service.p99 for each in rounds]),
        },
    }
    for rival in rivals:
        line[rival] = median(lambda r, k=rival: r.loads[k].rate)
        line[f"times_{rival}"] = median(lambda r, k=rival: r.service.rate / r.loads[k].rate)
        line[f"p99_of_{rival}"] = median(lambda r, k=rival: r.service.p99 / r.loads[k].p99)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "cases", nargs="*", default=["small-int8", "small-fp32", "large-fp32", "tiny"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--rivals", nargs="*", choices=list(RIVALS), default=DEFAULT_RIVALS)
    parser.add_argument("--environments", type=Path, help="folder for the rivals' packages")
    parser.add_argument("--keep", action="store_true", help="write the results to a file as well")
    parser.add_argument("--store", type=Path, help="keeps the bundles for the next run")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        store = options.store or Path(directory)
        rivals = prepare_rivals(options.rivals, options.environments)
        for case in options.cases:
            line = measure_case(store, case, options.rounds, options.seconds, rivals)
            print(json.dumps(line), flush=True)
            if options.keep:
                write_result(__file__, line, ("case",))


if __name__ == "__main__":
    main()
