"""The container engine of this machine, as docker/engine drives it."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def engine():
    """Runs docker or podman; skips where neither works."""

    def run(
        *words: str | Path, check: bool = True, timeout: float = 600
    ) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [ROOT / "docker/engine", *words], capture_output=True, text=True, timeout=timeout
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done

    probe = run("version", check=False)
    if probe.returncode:
        pytest.skip(probe.stderr.strip())
    return run
