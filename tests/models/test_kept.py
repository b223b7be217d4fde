"""Directories of kept images, on a disk and in a bucket: what is written is read again."""

import base64
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from models.kept import KeptError, KeptFolder, KeptImage, Label, Reason, Verdict, open_kept
from support import tiny_bundle
from support.kept_images import START, add_answered_image
from support.s3_server import s3_server


@pytest.fixture(scope="module")
def bucket() -> Iterator[None]:
    with s3_server("kept"):
        yield


@pytest.fixture(params=["directory", "bucket"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> KeptFolder:
    if request.param == "directory":
        return open_kept(tmp_path / "kept")
    request.getfixturevalue("bucket")
    return open_kept(f"s3://kept/{request.node.name}")


def label(
    kept: KeptFolder,
    image: KeptImage,
    name: str,
    who: str = "ann",
    second: int = 0,
    verdict: Verdict = Verdict.CLASS,
) -> None:
    time = START + timedelta(seconds=second)
    kept.add_labels([Label(digest=image.digest, verdict=verdict, label=name, who=who, time=time)])


def test_images_and_labels_are_read_as_they_were_added(kept):
    image = add_answered_image(kept)
    add_answered_image(kept, seed=1)
    label(kept, image, "rose")

    first, second = kept.read()
    assert kept.read_file(first.image) == tiny_bundle.make_image("red", size=64, seed=0)
    assert first.image.read_embedding().tolist() == [1, 2, 3]
    assert first.label.label == "rose"
    assert not first.has_conflict
    assert second.label is None


def test_lines_of_one_image_are_joined(kept):
    add_answered_image(kept, request_id="a")
    again = add_answered_image(kept, request_id="b")
    kept.add_image(
        again.model_copy(update={"reasons": [Reason.ABSTAIN], "probability": None}), None
    )

    (entry,) = kept.read()
    assert entry.image.reasons == [Reason.ABSTAIN, Reason.RANDOM]
    assert entry.image.weight == 8  # two draws with probability 1/4
    assert entry.image.request_ids == {"a", "b"}


def test_the_last_label_counts_and_conflicts_are_seen(kept):
    image = add_answered_image(kept)
    label(kept, image, "rose", "ann", 1)
    label(kept, image, "tulip", "bob", 2)
    (entry,) = kept.read()
    assert entry.label.label == "tulip"
    assert [other.who for other in entry.others] == ["ann"]

    label(kept, image, "", "bob", 3, Verdict.WITHDRAWN)
    (entry,) = kept.read()
    assert entry.label.label == "rose"
    assert not entry.has_conflict

    label(kept, image, "", "ann", 4, Verdict.WITHDRAWN)
    (entry,) = kept.read()
    assert entry.label is None


def test_a_request_is_deleted_with_its_lines_and_labels(kept):
    image = add_answered_image(kept, request_id="gone")
    other = add_answered_image(kept, seed=1, request_id="stays")
    label(kept, image, "rose")
    label(kept, other, "tulip")

    assert kept.delete_request("gone") == 1
    assert kept.delete_request("gone") == 0
    (entry,) = kept.read()
    assert entry.image.digest == other.digest
    assert entry.label.label == "tulip"
    for path, _ in kept.files.list_files():
        assert image.digest not in path
        assert image.digest.encode() not in kept.files.read(path)


def test_images_are_deleted_after_some_days(kept):
    today = (datetime.now(UTC).date() - START.date()).days
    old = add_answered_image(kept, seed=1, day=today - 31)
    new = add_answered_image(kept, seed=2, day=today - 29)
    label(kept, old, "rose")
    assert kept.delete_older(days=30) == 1
    assert [entry.image.digest for entry in kept.read()] == [new.digest]
    assert kept.read_labels() == {}


def test_a_label_of_an_image_that_is_gone_is_ignored(kept):
    image = add_answered_image(kept)
    label(kept, image, "rose")
    kept.files.remove(image.file)
    assert kept.read() == []


@pytest.mark.parametrize("end", [b'{"digest":"12', b"{}\n", b"\xff\xfe\n", b'[1]\n{"torn'])
def test_torn_and_foreign_lines_are_skipped(tmp_path, end):
    kept = open_kept(tmp_path)
    add_answered_image(kept)
    (file,) = tmp_path.glob("*/*.jsonl")
    file.write_bytes(file.read_bytes() + end)
    add_answered_image(kept, seed=1)
    assert len(kept.read()) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("time", "2026-11-30T12:00:00"),
        ("embedding", "abc"),
        ("embedding", base64.b64encode(b"abc").decode()),
        ("embedding", base64.b64encode(b"\0\x7c").decode()),
        ("probability", 5e-324),
        ("file", "../outside.png"),
        ("file", "2026-11-30/../../outside.png"),
    ],
)
def test_lines_that_cannot_be_used_are_skipped(tmp_path, field, value):
    kept = open_kept(tmp_path / "kept")
    add_answered_image(kept)
    (file,) = tmp_path.glob("kept/*/*.jsonl")
    add_answered_image(kept, seed=1)
    first, second = file.read_bytes().splitlines(keepends=True)
    hostile = json.dumps({**json.loads(second), field: value}).encode() + b"\n"
    file.write_bytes(first + hostile)
    (entry,) = kept.read()
    assert entry.image.embedding


def test_links_and_pipes_lead_nowhere(tmp_path):
    """Somebody else can write to the directory, such as on a shared volume."""
    kept = open_kept(tmp_path / "kept")
    images = [add_answered_image(kept, seed=seed) for seed in range(2)]
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    linked = tmp_path / "kept" / images[0].file
    linked.unlink()
    linked.symlink_to(secret)
    day = linked.parent
    os.mkfifo(day / "pipe.jsonl")
    (day / "circle.jsonl").symlink_to("circle.jsonl")
    (day / "there.jsonl").symlink_to(secret)
    (tmp_path / "kept" / "labels").symlink_to(tmp_path)

    assert [entry.image for entry in kept.read()] == [*kept.read_images().values()]
    assert [*kept.read_images()] == [images[1].digest]
    with pytest.raises(OSError, match="symbolic link"):
        kept.read_file(images[0])
    with pytest.raises(OSError, match="a link; replace it by a directory"):
        label(kept, images[1], "red")
    kept.delete_request("a")
    assert kept.read() == []
    assert secret.read_bytes() == b"secret"
    assert {path.name for path in tmp_path.iterdir()} == {"kept", "secret"}


def test_names_that_are_not_utf8_do_not_prevent_deletion(tmp_path):
    kept = open_kept(tmp_path)
    image = add_answered_image(kept)
    stranger = (tmp_path / image.file).parent / os.fsdecode(b"\xff.png")
    stranger.write_bytes(b"")
    assert kept.delete_request("a") == 1
    assert stranger.exists()


@pytest.mark.parametrize("url", ["ftp://host/kept", "s3://"])
def test_urls_that_are_no_bucket_are_refused(url):
    with pytest.raises(KeptError, match="s3://bucket/path"):
        open_kept(url)
