"""For tests that run `python -m train …` in processes of their own."""
from collections.abc import Iterator

import pytest
from launch import Commands


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    started = Commands(tmp_path_factory.mktemp("commands"))
    yield started
    started.close()
