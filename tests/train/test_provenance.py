"""What a bundle says of the code it comes from where there is no repository, as in an image."""

import pytest
import torch

from models.bundle import DataInfo
from train.export.provenance import provenance

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("told", "commit", "dirty"),
    [
        (COMMIT, COMMIT, False),
        (f"{COMMIT}-dirty", COMMIT, True),
        ("unknown", None, None),
        (None, None, None),
    ],
)
def test_an_image_knows_its_revision_as_its_build_told_it(
    told, commit, dirty, monkeypatch, tmp_path
):
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    monkeypatch.delenv("IMAGO_REVISION", raising=False)
    if told:
        monkeypatch.setenv("IMAGO_REVISION", told)
    found = provenance(
        torch.device("cpu"), DataInfo(source="digits", digest="", counts={}), 0, {}, {}
    )
    assert (found.git_commit, found.git_dirty) == (commit, dirty)
