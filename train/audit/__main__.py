"""`python -m train audit DATA`: look at data without training on it."""
import argparse
from pathlib import Path

from train import audit
from train.data import Augmentation, ImageData

REPORTS = "artifacts/audit"


def main(argv: list[str]) -> None:
    """Write the report and say where it is. Raises DataError with one line for data that can't be used."""
    parser = argparse.ArgumentParser("python -m train audit", description="Look for unreadable, duplicate, leaked, odd "
                                     "and mislabelled images; write a page with thumbnails, and JSON.")
    parser.add_argument("source", help="as for training: a name, a folder, a .csv, or scheme:place")
    parser.add_argument("--root", help="where a torchvision data set lies on disk")
    parser.add_argument("--out", help=f"directory of the report (default {REPORTS}/<name of the data>)")
    parser.add_argument("--size", type=int, help="side in pixels at which images are compared")
    parser.add_argument("--val-fraction", type=float, default=0.1, help="as in training (default %(default)s)")
    parser.add_argument("--test-fraction", type=float, default=0.2, help="as in training (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, as in training (default %(default)s)")
    parser.add_argument("--max-unreadable", type=float, default=1.0, help="stop where a larger share can't be read")
    parser.add_argument("--mirrored", action="store_true",
                        help="mirror images are duplicates too, as where training flips images")
    options = parser.parse_args(argv)
    data = ImageData(options.source, root=options.root, size=options.size, val_fraction=options.val_fraction,
                     test_fraction=options.test_fraction, seed=options.seed, max_unreadable=options.max_unreadable,
                     augment=Augmentation(flip="random" if options.mirrored else "none"))
    data.setup()
    out = Path(options.out or f"{REPORTS}/{data.found.name}")
    findings = audit.run(data, out)
    if not audit.summary(findings):
        print("audit: nothing found")
    print(f"audit: {out / 'index.html'} and {out / 'audit.json'}")
