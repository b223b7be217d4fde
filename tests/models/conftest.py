"""Fixtures: a bundle to damage, and `imago models verify PATH` to check it with."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from models.__main__ import main


@pytest.fixture
def bundle(bundle_store: Path, tmp_path: Path) -> Path:
    """Return a copy of a valid bundle."""
    return shutil.copytree(bundle_store / "colours" / "1", tmp_path / "bundle")


@pytest.fixture
def verify(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Return `verify(path, *flags)`: exit status, and the error line or the last line."""

    def run(path: Path, *flags: str) -> tuple[int, str]:
        status = main(["verify", str(path), *flags])
        output = capsys.readouterr()
        assert output.err.count("\n") == (1 if output.err else 0), output.err
        return status, output.err.strip() or output.out.strip().splitlines()[-1]

    return run
