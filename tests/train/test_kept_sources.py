"""Several sources in one run, and images that the service kept: training and live test images."""

import csv
import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from models.bundle import Bundle
from models.kept import Reason, Verdict
from support import RANDOM_CONVNET, ROOT, tiny_bundle
from support.kept_images import add_image, is_live_digest
from support.s3_server import s3_server
from support.sample_images import CLASSES, make_png, write_image_folder
from train.cli.recipes import default_model_name, find_recipe
from train.data import DataError, ImageData
from train.data.sources import open_source

FIRST = 1000  # seed of the first kept image


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("sources") / "photos", 20)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 random images and 6 uncertain ones, all labelled, and one each that is not used."""
    root = tmp_path_factory.mktemp("kept") / "kept"
    for i in range(24):
        add_image(root, make_png(i % 3, FIRST + i), CLASSES[i % 3], probability=0.5)
    for i in range(6):
        add_image(root, make_png(i % 3, FIRST + 100 + i), CLASSES[i % 3], Reason.ABSTAIN)
    add_image(root, make_png(0, FIRST + 200))
    add_image(root, make_png(0, FIRST + 201), verdict=Verdict.FOREIGN)
    return root


def open_data(source: object, **settings: object) -> ImageData:
    data = ImageData(str(source), cache="", **settings)
    data.setup()
    return data


def list_names(data: ImageData, part: str) -> list[str]:
    return [data.dataset.items.name(i) for i in data.index[part].tolist()]


def list_live_digests(data: ImageData) -> set[str]:
    digests = data.decoded.metadata["sha256"]
    return {digests[i].tobytes().hex() for i in data.live_positions.tolist()}


def test_labelled_images_join_training_and_change_no_other_part(photos, kept, capsys):
    alone = open_data(photos)
    data = open_data(f"{photos},kept:{kept}")
    assert list_names(data, "val") == list_names(alone, "val")
    assert list_names(data, "test") == list_names(alone, "test")
    added = set(list_names(data, "train")) - set(list_names(alone, "train"))
    random = [make_png(i % 3, FIRST + i) for i in range(24)]
    live = {hashlib.sha256(content).hexdigest() for content in random if is_live_digest(content)}
    assert 0 < len(live) < 24
    assert len(added) == 24 - len(live) + 6
    assert list_live_digests(data) == live
    used = np.concatenate([*data.index.values(), data.live_positions])
    assert len(used) == len(np.unique(used)) == 60 + 30

    printed = capsys.readouterr().err
    assert f"30 of 32 images are labelled; {len(live)} of them are the live test set" in printed
    assert "1 of 26 random images have no label" in printed


def test_the_live_test_set_stays_the_same_when_images_are_added(photos, kept, tmp_path):
    before = list_live_digests(open_data(f"{photos},kept:{kept}"))
    more = shutil.copytree(kept, tmp_path / "kept")
    for i in range(10):
        add_image(more, make_png(i % 3, FIRST + 300 + i), CLASSES[i % 3])
    after = list_live_digests(open_data(f"{photos},kept:{more}"))
    assert before < after


def test_copies_of_live_images_are_in_no_part(photos, kept, tmp_path, capsys):
    root = shutil.copytree(photos, tmp_path / "photos")
    live = next(
        content
        for content in (make_png(i % 3, FIRST + i) for i in range(24))
        if is_live_digest(content)
    )
    (root / "red" / "copy.png").write_bytes(live)
    data = open_data(f"{root},kept:{kept}")
    names = [*list_names(data, "train"), *list_names(data, "val"), *list_names(data, "test")]
    assert "red/copy.png" not in names
    assert "1 images are left out: copies of live test images" in capsys.readouterr().err


def test_weights_are_those_of_the_sampling(kept):
    dataset = open_source(f"kept:{kept}")
    is_live = dataset.parts == "live"
    assert set(dataset.live_weights[is_live].tolist()) == {2.0}
    assert set(dataset.live_weights[~is_live].tolist()) == {0.0}


def test_a_class_that_only_kept_images_have_is_added(photos, tmp_path, capsys):
    kept = tmp_path / "kept"
    for i in range(4):
        add_image(kept, make_png(1, FIRST + i), "violet", Reason.OUT_OF_DISTRIBUTION)
    data = open_data(f"{photos},kept:{kept}")
    assert data.classes == ["blue", "green", "red", "violet"]
    assert data.count_classes("train").tolist()[3] == 4
    assert data.count_classes("test").tolist()[3] == 0
    assert list_names(data, "test") == list_names(open_data(photos), "test")
    assert "classes that only kept images have: violet" in capsys.readouterr().err


def test_a_live_image_of_an_unknown_class_is_left_out(photos, tmp_path, capsys):
    kept = tmp_path / "kept"
    contents = [make_png(0, FIRST + i) for i in range(20)]
    live = next(content for content in contents if is_live_digest(content))
    add_image(kept, live, "violet")
    data = open_data(f"{photos},kept:{kept}")
    assert data.classes == CLASSES
    assert len(data.live_positions) == 0
    assert "1 live test images are left out: no other image has their class" in (
        capsys.readouterr().err
    )


def test_a_client_does_not_label_the_live_test_set(tmp_path, photos):
    """Clients correct mistakes, so that their labels are not those of a random sample."""
    kept = tmp_path / "kept"
    for i in range(12):
        add_image(kept, make_png(0, FIRST + i), "blue", who="feedback")
    data = open_data(f"{photos},kept:{kept}")
    assert len(data.live_positions) == 0
    trained = sum(name.startswith("2/") for name in list_names(data, "train"))
    assert trained == sum(not is_live_digest(make_png(0, FIRST + i)) for i in range(12))


def test_the_last_of_two_labels_counts(photos, tmp_path, capsys):
    kept = tmp_path / "kept"
    content = make_png(0, FIRST)
    add_image(kept, content, "red", Reason.ABSTAIN, who="ann")
    add_image(kept, content, "blue", Reason.ABSTAIN, who="bob", second=1)
    data = open_data(f"{photos},kept:{kept}")
    assert data.counts["train"] == open_data(photos).counts["train"] + 1
    assert data.classes[data.dataset.labels[-1]] == "blue"
    assert "people disagree on 1 images; the last label counts" in capsys.readouterr().err


def test_a_bucket_that_is_away_is_told_in_one_line(photos, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    data = ImageData(f"{photos},kept:s3://bucket/kept", cache=str(tmp_path))
    with pytest.raises(DataError, match=r"^kept:s3://bucket/kept: .*$"):
        data.setup()


def test_sources_are_listed_in_a_file(photos, kept, tmp_path):
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "kept").symlink_to(kept)
    file = tmp_path / "flowers.txt"
    file.write_text("# all that we have\nphotos\n\nkept:kept\n")
    listed = open_data(file)
    given = open_data(f"{photos},kept:{kept}")
    assert listed.digest == given.digest
    assert default_model_name(str(file)) == "flowers"
    assert find_recipe(None, f"digits,kept:{kept}").name == "digits.yaml"


def test_plain_sources_are_joined_with_their_corrections(photos, tmp_path):
    first = shutil.copytree(photos, tmp_path / "first, second")
    second = write_image_folder(tmp_path / "more", 5, first=500)
    (first / "corrections.csv").write_text("path,action,label\nred/000.png,leave out,\n")
    (second / "corrections.csv").write_text("path,action,label\nred/000.png,relabel,blue\n")
    data = open_data(f"{first},{second}")
    assert len(data.dataset.items) == 75
    assert sum(data.counts.values()) == 74
    assert data.dataset.count_relabelled() == 1
    assert default_model_name(f"{first},{second}") == "first--second"


def test_kept_images_in_a_bucket_are_copied_once(photos, tmp_path):
    with s3_server("bucket"):
        for i in range(6):
            add_image("s3://bucket/kept", make_png(0, FIRST + i), "blue", Reason.ABSTAIN)
        source = f"{photos},kept:s3://bucket/kept"
        data = ImageData(source, cache=str(tmp_path / "cache"))
        data.setup()
        assert data.counts["train"] == open_data(photos).counts["train"] + 6
        assert len(list((tmp_path / "cache" / "kept").iterdir())) == 6
        with pytest.raises(DataError, match="are copied to the cache; set"):
            open_data(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{photos},kept:{empty}", "0 images, none of them labelled with a class; label them first"),
        ("kept:{kept},kept:{kept}", "kept images only; give the data that they join, too"),
        ("{photos},kept:ftp://host/x", "s3://bucket/path"),
        ("{empty}/none.txt", "no such folder"),
        ("{photos},/gone", "/gone: no such folder"),
    ],
)
def test_sources_that_cannot_be_read_are_refused(photos, kept, tmp_path, source, message):
    text = source.format(photos=photos, kept=kept, empty=tmp_path)
    with pytest.raises(DataError, match=message):
        open_data(text)


def test_a_file_of_corrections_is_for_one_source(photos, kept, tmp_path):
    file = tmp_path / "corrections.csv"
    file.write_text("path,action,label\n")
    with pytest.raises(DataError, match="names one file, for one source"):
        open_data(f"{photos},kept:{kept}", corrections=str(file))


def test_an_empty_list_is_refused(tmp_path):
    (tmp_path / "list.txt").write_text("# nothing\n")
    with pytest.raises(DataError, match="lists no source; write one a line"):
        open_data(tmp_path / "list.txt")


# Training, and the gate


def test_a_new_version_is_compared_on_the_live_test_set(commands, photos, kept, tmp_path):
    """Version 1 knows three classes; version 2 learns a fourth one from kept images."""
    tiny_bundle.publish(tmp_path / "store", name="photos")
    kept = shutil.copytree(kept, tmp_path / "kept")
    for i in range(6):
        add_image(kept, make_png(1, FIRST + 400 + i), "violet", Reason.OUT_OF_DISTRIBUTION)
    flags = (
        *("--name", "photos", "--store", tmp_path / "store", "--progress.quiet", "true"),
        *("--trainer.default_root_dir", tmp_path / "runs", "--trainer.max_epochs", 1),
        *("--export.quantize.enabled", "false", "--logger", "none", *RANDOM_CONVNET),
        *("--audit.enabled", "false", "--export.gate.live_images", 5),
        *(f"--export.gate.{name}=1" for name in ("accuracy", "class_recall", "calibration")),
    )
    commands.run("run", f"{photos},kept:{kept}", *flags, cwd=ROOT)

    bundle = Bundle(tmp_path / "store" / "photos" / "latest")
    manifest = bundle.manifest
    assert manifest.version == 2
    assert manifest.classes == ["blue", "green", "red", "violet"]
    assert manifest.gate is not None
    assert manifest.gate.part == "live"
    assert any(note.startswith("class violet is added: ") for note in manifest.notes)
    with (bundle.path / "test_images.csv").open() as file:
        rows = list(csv.DictReader(file))
    live = [row for row in rows if row["part"] == "live"]
    assert manifest.gate.images == len(live) > 0
    assert {row["weight"] for row in live} == {"2"}
    assert {Path(row["path"]).parent.parent for row in live} == {kept}
    assert {Path(row["path"]).stem for row in live} == {row["sha256"] for row in live}
