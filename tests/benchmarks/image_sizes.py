"""Print what takes space in an image, unpacked.

    python tests/benchmarks/image_sizes.py [IMAGE ...]

Prints a table for each image: megabytes (10^6 bytes) of its parts, the largest first.
"""

import argparse
import subprocess
import sys
from collections import Counter

from project_path import ROOT

ENGINE = ROOT / "docker/engine"
IMAGES = ["localhost/imago-serve:0.1.0", "localhost/imago-train:0.1.0"]
PACKAGES = "/opt/imago/lib/python3.11/site-packages/"

# Directories of site-packages that are shown under another name.
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
LEAST_BYTES = 4_000_000
"""Smaller parts are summed up as `the rest`."""


def list_files(image: str) -> list[tuple[int, str]]:
    """(bytes, path) of every file, hard links once."""
    find = ["find", "/", "-xdev", "-type", "f", "-printf", r"%i %s %p\n"]
    result = subprocess.run(
        [ENGINE, "run", "--rm", "--user=0", f"--entrypoint={find[0]}", image, *find[1:]],
        capture_output=True,
        text=True,
    )
    files: dict[str, tuple[int, str]] = {}
    for line in result.stdout.splitlines():
        inode, size, path = line.split(" ", 2)
        files[inode] = (int(size), path)
    if not files:
        sys.exit(f"image_sizes: {image}: {result.stderr.strip().splitlines()[-1]}")
    return list(files.values())


def name_part(path: str) -> str:
    """The part of the image that a file belongs to, e.g. a package's name."""
    if path.startswith(PACKAGES):
        directory = path.removeprefix(PACKAGES).split("/")[0]
        return OWNERS.get(directory, directory)
    if path.startswith(("/app/", "/opt/")):
        return "Imago"
    return "Python" if "/python3" in path else "Debian"


def measure_parts(image: str) -> Counter[str]:
    """Bytes of each part."""
    sizes: Counter[str] = Counter()
    for size, path in list_files(image):
        sizes[name_part(path)] += size

    small = [name for name, size in sizes.items() if size < LEAST_BYTES and name != "Imago"]
    sizes["the rest"] = sum(sizes.pop(name) for name in small)
    return sizes


def print_table(image: str) -> None:
    sizes = measure_parts(image)
    print(f"\n| {image} | MB |\n| --- | ---: |")
    for name, size in sizes.most_common():
        print(f"| {name} | {size / 1e6:.1f} |")
    print(f"| all | {sizes.total() / 1e6:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="*", default=IMAGES)
    for image in parser.parse_args().images:
        print_table(image)


if __name__ == "__main__":
    main()
