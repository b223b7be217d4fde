"""Fixtures of all tests: a small bundle, servers, training commands, a browser.

The variable OMP_NUM_THREADS is set to 1, since tests run side by side, and several libraries with a
thread per core each wait for one another.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from models.bundle import Bundle
from support import ROOT, tiny_bundle
from support.forked_commands import ForkedCommands
from support.server import Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser

os.environ.setdefault("OMP_NUM_THREADS", "1")

MAX_ENDING_SERVERS = 8

# On a busy machine an example may take any time, and so may their generation.
settings.register_profile(
    "busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("busy machine")

# Test files that take longest, the longest first. They start first, so that no process works on one
# of them alone at the end.
LONG_FILES = (
    "tests/train/test_fit.py",
    "tests/serve/test_survival.py",
    "tests/test_end_to_end.py",
    "tests/train/test_failures.py",
    "tests/train/test_resume.py",
    "tests/serve/test_page.py",
    "tests/train/test_probe.py",
    "tests/train/test_backbones.py",
    "tests/train/test_data.py",
    "tests/train/test_weights.py",
    "tests/serve/test_label_page.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take longest."""
    ranks = {name: rank for rank, name in enumerate(LONG_FILES)}

    def rank(item: pytest.Item) -> int:
        return ranks.get(item.nodeid.partition("::")[0], len(LONG_FILES))

    items.sort(key=rank)


@pytest.fixture(scope="session")
def bundle_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one version of `colours`. Read only; to change one use `tiny_bundle.publish`."""
    store = tmp_path_factory.mktemp("store")
    tiny_bundle.publish(store)
    return store


@pytest.fixture(scope="session")
def shared_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that all processes of pytest-xdist share."""
    directory = tmp_path_factory.getbasetemp()
    return directory.parent if "PYTEST_XDIST_WORKER" in os.environ else directory


@pytest.fixture(scope="session")
def serve_commands(
    shared_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ForkedCommands]:
    """Starts `python -m serve …` without the time of its imports."""
    directory = tmp_path_factory.mktemp("serve-commands")
    commands = ForkedCommands("serve", directory, shared_directory)
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def run_serve(serve_commands: ForkedCommands) -> Callable[..., CompletedProcess[str]]:
    """`run_serve("check", "--store", store, IMAGO_MODEL="colours")`: run a command to its end.

    The environment of the command is PATH and these variables.
    """
    unset = dict.fromkeys((*os.environ, "OMP_NUM_THREADS", "PYTHONPATH", "XDG_CACHE_HOME"))

    def run(*flags: object, **env: str) -> CompletedProcess[str]:
        variables = {**unset, "PATH": "/usr/bin", **env}
        return serve_commands.complete(*flags, env=variables, cwd=ROOT)

    return run


@pytest.fixture(scope="session")
def server(
    bundle_store: Path, serve_commands: ForkedCommands, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A ready server that all tests share. Don't overload, drain or kill it."""
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(bundle_store, log, forker=serve_commands) as server:
        yield server.wait_ready()


@pytest.fixture(scope="session")
def ending_servers() -> Iterator[list[Server]]:
    """Servers that drain while the next tests run."""
    servers: list[Server] = []
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture
def start(
    bundle_store: Path,
    serve_commands: ForkedCommands,
    ending_servers: list[Server],
    tmp_path: Path,
) -> Iterator[Callable[..., Server]]:
    """Start servers for one test: `start("--max-pending", "4")`, ready unless `wait=False`."""
    servers: list[Server] = []

    def start_server(
        *flags: str, store: Path = bundle_store, wait: bool = True, **options: object
    ) -> Server:
        log = tmp_path / f"log-{len(servers)}"
        server = Server(store, log, *flags, forker=serve_commands, **options)
        servers.append(server)
        return server.wait_ready() if wait else server

    yield start_server

    for server in servers:
        server.begin_stop()
    ending_servers[:] = [server for server in ending_servers if server.process.poll() is None]
    ending_servers += servers
    while len(ending_servers) > MAX_ENDING_SERVERS:
        ending_servers.pop(0).stop()


@pytest.fixture(scope="session")
def commands(
    shared_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ForkedCommands]:
    """Starts `python -m train …` without the time of its imports."""
    commands = ForkedCommands("train", tmp_path_factory.mktemp("commands"), shared_directory)
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def fitted(commands: ForkedCommands) -> Callable[..., Bundle]:
    """`fitted(directory, *flags)`: the bundle of `train fit` on scikit-learn's digits."""

    def fit(directory: Path, *flags: object) -> Bundle:
        settings = (
            *("--data.source", "digits"),
            *("--store", directory / "store"),
            *("--trainer.default_root_dir", directory / "runs"),
            *("--progress.quiet", "true"),
        )
        commands.run("fit", *settings, *flags, cwd=ROOT)
        return Bundle(directory / "store" / "digits" / "latest")

    return fit


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """The machine's Chromium, driven by Playwright.

    For one module, since Playwright's event loop must not run while tests of others do.
    """
    from playwright.sync_api import expect, sync_playwright

    from support.chromium import BROWSER_MS, find_chromium, launch_chromium

    path = find_chromium()
    if path is None:
        pytest.skip("Chromium is not installed")
    expect.set_options(timeout=BROWSER_MS)
    with sync_playwright() as playwright:
        browser = launch_chromium(playwright, path)
        yield browser
        browser.close()
