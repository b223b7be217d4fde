"""Take the two screenshots of the README: the page of the service and the model card.

    python tests/screenshots.py [--store artifacts/store] [--model digits] [--out .github/assets]

It serves the model from the store (`make train` puts `digits` there), classifies two samples of
the bundle on the page, and opens the bundle's report.html. Needs Chromium.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from playwright.sync_api import Browser, sync_playwright  # noqa: E402

from models.store import Store  # noqa: E402
from support.chromium import find_chromium, launch_chromium  # noqa: E402
from support.server import Server  # noqa: E402

# CSS pixels.
WIDTH = 1100
HEIGHT = 760


def shoot_page(browser: Browser, url: str, file: Path) -> None:
    """Classify two samples on the page and save a picture of it."""
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    page.goto(url)
    samples = page.locator("#strip button")
    for index in (0, 3):
        samples.nth(index).click()
        page.locator("#results .card .label").first.wait_for()
    page.locator("#results .bars li").nth(1).wait_for()
    page.screenshot(path=file)
    page.close()


def shoot_report(browser: Browser, report: Path, file: Path) -> None:
    """Save a picture of the top of a model card."""
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    page.goto(report.resolve().as_uri())
    page.screenshot(path=file)
    page.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, default=ROOT / "artifacts/store")
    parser.add_argument("--model", default="digits")
    parser.add_argument("--out", type=Path, default=ROOT / ".github/assets")
    arguments = parser.parse_args()

    chromium = find_chromium()
    if chromium is None:
        print("error: Chromium is not installed", file=sys.stderr)
        return 2

    bundle = Store(arguments.store).path(arguments.model)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as playwright:
        browser = launch_chromium(playwright, chromium)
        with Server(arguments.store, Path(directory) / "log", "--model", arguments.model) as server:
            server.wait_ready()
            shoot_page(browser, server.url, arguments.out / "page.png")
        shoot_report(browser, bundle / "report.html", arguments.out / "report.png")
        browser.close()

    if shutil.which("pngquant"):  # a third of the size
        files = [arguments.out / "page.png", arguments.out / "report.png"]
        subprocess.run(["pngquant", "--force", "--ext", ".png", *files], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
