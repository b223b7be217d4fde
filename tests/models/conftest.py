"""A bundle to be spoiled, and the door that everybody can use: `python -m models verify PATH`."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from models.__main__ import main


@pytest.fixture
def bundle(bundle_store: Path, tmp_path: Path) -> Path:
    """A copy of a good bundle."""
    return shutil.copytree(bundle_store / "colours" / "1", tmp_path / "bundle")


@pytest.fixture
def verify(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """`verify(path, *flags)`: exit status, and the one line that says why (or the last line where all is well)."""

    def run(path: Path, *flags: str) -> tuple[int, str]:
        status = main(["verify", str(path), *flags])
        said = capsys.readouterr()
        assert said.err.count("\n") == (1 if said.err else 0), said.err
        return status, said.err.strip() or said.out.strip().splitlines()[-1]

    return run
