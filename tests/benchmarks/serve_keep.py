"""Measure what `--keep` costs: requests per second, p99 and CPU, with and without, in pairs.

    python tests/benchmarks/serve_keep.py [small-int8] [--rounds 12] [--seconds 4] [--share 0.01]
        [--keep]

Both servers run at the same time, and wrk loads one at a time with 512 different images (32
clients); the order within a pair alternates. Prints one JSON line: medians of the pairs' ratios
(kept to not kept), their quartiles (`spread`), and how many images were kept. With the defaults it
takes less than 2 minutes. The target is a ratio of 0.98 to 1.02. --keep also writes the line into
serve_keep.json in this folder.
"""

import argparse
import json
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from results import write_result
from serve_models import publish
from serving import LoadResult, measure_load, running_service

from models.kept import open_kept

IMAGES = 512
IMAGE_SIDE = 32
FIGURES = ("rate", "p99", "cpu")
WRK_SCRIPT = """wrk.method = "POST"
wrk.headers["Content-Type"] = "image/jpeg"
local bodies = {{}}
for i = 0, {last} do
  local file = io.open("{directory}/" .. i .. ".jpg", "rb")
  bodies[i] = file:read("*a")
  file:close()
end
local next_body = 0
request = function()
  next_body = (next_body + 1) % {count}
  return wrk.format(nil, nil, nil, bodies[next_body])
end
"""


def write_script(directory: Path) -> Path:
    """Write different images, and a script of wrk that sends them in turn."""
    random = np.random.default_rng(0)
    for i in range(IMAGES):
        pixels = random.integers(0, 256, (IMAGE_SIDE, IMAGE_SIDE, 3), np.uint8)
        cv2.imwrite(str(directory / f"{i}.jpg"), pixels)
    script = directory / "images.lua"
    script.write_text(WRK_SCRIPT.format(last=IMAGES - 1, count=IMAGES, directory=directory))
    return script


def measure(name: str, rounds: int, seconds: int, share: float) -> dict[str, Any]:
    """Return the medians and quartiles of the pairs' ratios."""
    model, _, variant = name.partition("-")
    pairs: list[dict[bool, LoadResult]] = []
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        root = Path(directory)
        publish(root / "store", model)
        (root / "images").mkdir()
        script = write_script(root / "images")
        keep = ("--keep", str(root / "kept"), "--keep-share", str(share), "--keep-files", "1000000")
        servers = {}
        for keeps, flags in ((False, ()), (True, keep)):
            service = running_service(root / "store", model, "--variant", variant or "fp32", *flags)
            servers[keeps] = stack.enter_context(service)
            measure_load(servers[keeps], script, 1)

        for number in range(rounds):
            order = (False, True) if number % 2 else (True, False)
            pairs.append({keeps: measure_load(servers[keeps], script, seconds) for keeps in order})
        kept = open_kept(root / "kept").read_images()

    line: dict[str, Any] = {"case": name, "share": share, "kept": len(kept), "spread": {}}
    line["rate_without"] = round(statistics.median(pair[False].rate for pair in pairs), 1)
    for figure in FIGURES:
        ratios = [getattr(pair[True], figure) / getattr(pair[False], figure) for pair in pairs]
        lower, middle, upper = statistics.quantiles(ratios, n=4)
        line[figure] = round(middle, 3)
        line["spread"][figure] = [round(lower, 3), round(upper, 3)]
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="?", default="small-int8")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--keep", action="store_true", help="write the result to a file as well")
    options = parser.parse_args()
    result = measure(options.case, options.rounds, options.seconds, options.share)
    print(json.dumps(result), flush=True)
    if options.keep:
        write_result(__file__, result, ("case", "share"))


if __name__ == "__main__":
    main()
