"""Fixture: docker or podman, through docker/engine."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def engine() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs docker or podman; skip where neither works."""

    def run(
        *arguments: str | Path, check: bool = True, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [ROOT / "docker/engine", *arguments], capture_output=True, text=True, timeout=timeout
        )
        assert not check or result.returncode == 0, f"{arguments}: {result.stdout}{result.stderr}"
        return result

    probe = run("version", check=False)
    if probe.returncode:
        pytest.skip(probe.stderr.strip())
    return run
