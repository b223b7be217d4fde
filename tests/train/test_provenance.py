"""The code revision in a bundle where there is no git repository, as in a container image."""

import pytest
import torch

from models.bundle import DataInfo
from train.export.provenance import build_provenance

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("revision", "commit", "is_dirty"),
    [
        (COMMIT, COMMIT, False),
        (f"{COMMIT}-dirty", COMMIT, True),
        ("unknown", None, None),
        (None, None, None),
    ],
)
def test_revision_comes_from_the_environment_without_a_repository(
    revision, commit, is_dirty, monkeypatch, tmp_path
):
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    monkeypatch.delenv("IMAGO_REVISION", raising=False)
    if revision:
        monkeypatch.setenv("IMAGO_REVISION", revision)

    data = DataInfo(source="digits", digest="", counts={})
    provenance = build_provenance(torch.device("cpu"), data, {"seed_everything": 0}, {})

    assert (provenance.git_commit, provenance.git_dirty) == (commit, is_dirty)
