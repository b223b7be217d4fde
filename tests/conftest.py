"""Shared by all tests: a small bundle in a store of its own, and real server processes."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import ROOT, tiny_bundle
from support.server import Server
from support.train_commands import TrainCommands

from models.bundle import Bundle

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # tests run side by side, and threads that wait for each other do not


@pytest.fixture(scope="session")
def bundle_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one version of `colours`. Don't change it; write one of your own with `tiny.write`."""
    store = tmp_path_factory.mktemp("store")
    tiny_bundle.publish(store)
    return store


@pytest.fixture(scope="session")
def server(bundle_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A ready server that all tests share. Don't overload, drain or kill it."""
    with Server(bundle_store, tmp_path_factory.mktemp("server") / "log") as running:
        yield running.wait_ready()


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainCommands]:
    """Runs `python -m train …` in processes that begin at once."""
    started = TrainCommands(tmp_path_factory.mktemp("commands"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def fitted(commands: TrainCommands) -> Callable[..., Bundle]:
    """`fitted(place, *flags)`: the bundle of `python -m train fit` on scikit-learn's digits."""

    def fit(place: Path, *flags: str) -> Bundle:
        commands.run(
            "fit",
            "--data.source",
            "digits",
            "--store",
            place / "store",
            "--trainer.default_root_dir",
            place / "runs",
            "--progress.quiet",
            "true",
            *flags,
            cwd=ROOT,
        )
        return Bundle(place / "store" / "digits" / "latest")

    return fit


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """The machine's Chromium, driven by Playwright, whose event loop other modules must not meet."""
    from playwright.sync_api import sync_playwright

    chromium = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield running
        running.close()


@pytest.fixture
def start(bundle_store: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start servers of one's own: `start("--max-pending", "4")`, ready unless `wait=False`; they end with the test."""
    running: list[Server] = []

    def run(*flags: str, store: Path = bundle_store, wait: bool = True, **options) -> Server:
        running.append(Server(store, tmp_path / f"log-{len(running)}", *flags, **options))
        return running[-1].wait_ready() if wait else running[-1]

    yield run
    for one in running:
        one.stop()
