"""What weighs what in an image, unpacked: python tests/benchmarks/image_sizes.py [IMAGE …]

Prints a table in megabytes (10^6 bytes) of the parts of each image, largest first.
"""

import argparse
import subprocess
import sys
from collections import Counter
from pathlib import Path

ENGINE = Path(__file__).parents[2] / "docker/engine"
PACKAGES = "/opt/imago/lib/python3.11/site-packages/"
OWNERS = {
    "opencv_python_headless.libs": "opencv",
    "cv2": "opencv",
    "numpy.libs": "numpy",
    "scipy.libs": "scipy",
    "sklearn": "scikit-learn",
    "pydantic_core": "pydantic",
    "nvidia": "CUDA libraries",
    "triton": "triton",
}
LEAST = 4  # megabytes; what is smaller is counted together


def files(image: str) -> list[tuple[int, str]]:
    """(bytes, path) of every file, hard links once."""
    find = ["find", "/", "-xdev", "-type", "f", "-printf", r"%i %s %p\n"]
    out = subprocess.run(
        [ENGINE, "run", "--rm", "--user=0", f"--entrypoint={find[0]}", image, *find[1:]],
        capture_output=True,
        text=True,
    )
    found = {}
    for line in out.stdout.splitlines():
        inode, size, path = line.split(" ", 2)
        found[inode] = (int(size), path)
    if not found:
        sys.exit(f"image_sizes: {image}: {out.stderr.strip().splitlines()[-1]}")
    return list(found.values())


def part(path: str) -> str:
    if path.startswith(PACKAGES):
        top = path.removeprefix(PACKAGES).split("/")[0]
        return OWNERS.get(top, top)
    if path.startswith(("/app/", "/opt/")):
        return "Imago"
    return "Python" if "/python3" in path else "Debian"


def main(images: list[str]) -> None:
    for image in images:
        sizes: Counter = Counter()
        for size, path in files(image):
            sizes[part(path)] += size
        small = {name for name, size in sizes.items() if size < LEAST * 1e6 and name != "Imago"}
        sizes["the rest"] = sum(sizes.pop(name) for name in small)
        print(f"\n| {image} | MB |\n| --- | ---: |")
        for name, size in sizes.most_common():
            print(f"| {name} | {size / 1e6:.1f} |")
        print(f"| all | {sizes.total() / 1e6:.0f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "images", nargs="*", default=["localhost/imago-serve:0.1.0", "localhost/imago-train:0.1.0"]
    )
    main(parser.parse_args().images)
