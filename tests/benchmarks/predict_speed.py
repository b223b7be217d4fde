"""Compare `serve predict`, which bulk-predict runs, with the service: images a second and core.

    python tests/benchmarks/predict_speed.py [small large] [--rounds 3] [--seconds 3]
        [--images 2000] [--keep]

Both classify the same JPEG with the same bundle on the same cores; rounds alternate. A rate is the
number of images divided by the CPU seconds of all processes, so that other load on the machine
disturbs it little, and a client that shares the cores does not count. Of `serve predict` the start
is taken off: the CPU seconds of a run with few files are subtracted. `ratio` is the median of the
rounds' ratios, `serve predict` to the service. One JSON line a case; --keep also writes it into
predict_speed.json in this folder.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from results import ROOT, spread, write_result
from serve_models import make_jpeg, publish
from serving import (
    RunningServer,
    children_cpu_seconds,
    measure_load,
    resumed,
    running_service,
    suspend,
    write_wrk_script,
)

CASES = {"small": (32, 32), "large": (375, 500)}  # height and width of the JPEG
FEW_IMAGES = 32
WARM_UP_SECONDS = 1


def write_images(directory: Path, image: bytes, count: int) -> Path:
    """Write copies of an image; return their directory."""
    directory.mkdir()
    for number in range(count):
        (directory / f"{number:06d}.jpg").write_bytes(image)
    return directory


def predict_cpu_seconds(store: Path, case: str, images: Path) -> float:
    """CPU seconds of one `serve predict` that classifies the images of a directory."""
    command = [sys.executable, "-m", "serve", "predict", str(images), "--format", "csv"]
    before = children_cpu_seconds()
    subprocess.run(
        [*command, "--store", str(store), "--model", case],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return children_cpu_seconds() - before


def measure_round(
    store: Path, case: str, server: RunningServer, script: Path, seconds: int, count: int
) -> dict[str, float]:
    """Images a second and core of both, in one round."""
    few = predict_cpu_seconds(store, case, store / f"{case}-few")
    many = predict_cpu_seconds(store, case, store / f"{case}-many")
    predict = (count - FEW_IMAGES) / (many - few)
    with resumed(server):
        service = 1 / measure_load(server, script, seconds).cpu
    return {"predict": predict, "service": service, "ratio": predict / service}


def measure_case(store: Path, case: str, rounds: int, seconds: int, count: int) -> dict:
    """Medians and spread over the rounds."""
    image = make_jpeg(*CASES[case])
    publish(store, case)
    write_images(store / f"{case}-few", image, FEW_IMAGES)
    write_images(store / f"{case}-many", image, count)
    script = write_wrk_script(store, image)

    measured: list[dict[str, float]] = []
    # A suspended worker must not be taken for a hung one.
    with running_service(store, case, "--worker-timeout-seconds", "600") as server:
        measure_load(server, script, WARM_UP_SECONDS)
        suspend(server)
        for _ in range(rounds):
            measured.append(measure_round(store, case, server, script, seconds, count))

    result: dict = {"case": case, "images": count, "spread": {}}
    for name in measured[0]:
        values = [figures[name] for figures in measured]
        result[name] = round(statistics.median(values), 3 if name == "ratio" else 1)
        result["spread"][name] = spread(values)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--images", type=int, default=2000, help="files of a run of serve predict")
    parser.add_argument("--keep", action="store_true", help="write the results to a file as well")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        for case in options.cases:
            result = measure_case(
                Path(directory), case, options.rounds, options.seconds, options.images
            )
            print(json.dumps(result), flush=True)
            if options.keep:
                write_result(__file__, result, ("case",))


if __name__ == "__main__":
    main()
