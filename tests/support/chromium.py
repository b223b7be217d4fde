"""The Chromium that is installed on this machine, driven by Playwright, which downloads none."""

import shutil

from playwright.sync_api import Browser, Playwright

# For what a page shows in milliseconds, on a busy machine.
BROWSER_MS = 120_000
COMMANDS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find_chromium() -> str | None:
    """The path of Chromium; None where it is not installed."""
    for command in COMMANDS:
        path = shutil.which(command)
        if path:
            return path
    return None


def launch_chromium(playwright: Playwright, path: str) -> Browser:
    return playwright.chromium.launch(executable_path=path, args=FLAGS)
