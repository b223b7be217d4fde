"""`imago models compare` and `promote`: two bundles on the same images, and the gate's decision."""

import hashlib
import io
import json
import shutil
import struct
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from models.__main__ import main
from models.bundle import Gate
from models.comparison import Comparison, GateConfig, TestImage, decide
from models.comparison.results import (
    CandidateInfo,
    ClassComparison,
    Difference,
    PairCounts,
    PartComparison,
)
from models.comparison.statistics import (
    calibration_error,
    effective_images,
    mcnemar_exact,
    mcnemar_mid_p,
    paired_difference,
    weighted_mean,
)
from models.comparison.test_images import write_test_images
from support import tiny_bundle

SWAPPED = ["green", "red", "blue"]  # a model that takes red for green, and green for red
IMAGES_PER_CLASS = 20


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder a class; `gray` is none of the first model's classes."""
    root = tmp_path_factory.mktemp("photos") / "photos"
    for label in tiny_bundle.CLASSES:
        (root / label).mkdir(parents=True)
        for i in range(IMAGES_PER_CLASS):
            (root / label / f"{i:02d}.png").write_bytes(tiny_bundle.make_image(label, seed=i))
    (root / "gray").mkdir()
    (root / "gray" / "0.png").write_bytes(tiny_bundle.make_image("red", seed=99))
    return root


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """Version 1 is right, version 2 swaps two classes, and version 3 knows one class more.

    Version 2 lists all but 10 of the images. Version 4 is like version 1, and lists none.
    """
    store = tmp_path_factory.mktemp("compared")
    paths = sorted(photos.glob("*/*.png"))
    list_images(tiny_bundle.publish(store), paths)
    list_images(tiny_bundle.publish(store, classes=SWAPPED), paths[10:])
    list_images(tiny_bundle.publish(store, classes=["red", "green", "blue", "gray"]), paths)
    tiny_bundle.publish(store)
    return store


def list_images(bundle: Path, paths: list[Path], is_packed: bool = False) -> None:
    """Write the list of test images; their class is the name of their folder."""
    images: list[TestImage] = []
    for path in paths:
        images.append(
            TestImage(
                name=str(path),
                label=path.parent.name,
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                part="test",
                weight=1.0,
                read=partial(Path.read_bytes, path),
            )
        )
    write_test_images(bundle, images, is_packed)
    tiny_bundle.update_checksums(bundle)


def compare(store: Path, *arguments: object) -> tuple[int, dict]:
    """Run the command; return its exit status and its JSON."""
    file = store.parent / "comparison.json"
    file.unlink(missing_ok=True)
    words = ["compare", *map(str, arguments), "--store", str(store), "--json", str(file)]
    status = main(words)
    return status, json.loads(file.read_text())


@pytest.mark.parametrize("how", ["NAME/VERSION", "path", "NAME"])
def test_a_worse_version_is_compared_image_by_image(store, how, capsys):
    names = {
        "NAME/VERSION": ("colours/1", "colours/2"),
        "path": (store / "colours" / "1", store / "colours" / "2"),
        "NAME": ("colours", "colours/2"),
    }
    status, result = compare(store, *names[how])
    assert status == 1
    part = result["parts"]["test"]
    assert part["images"] == 50  # without the 10 blue ones, and the gray one
    assert part["pairs"] == {"both_right": 10, "lost": 40, "gained": 0, "both_wrong": 0}
    assert part["old_accuracy"] == 1
    assert part["new_accuracy"] == 10 / 50
    assert part["difference"]["low"] < -0.8 < part["difference"]["high"] < 0
    assert part["p_exact"] == pytest.approx(2 * 0.5**40)
    assert {image["predicted"] for image in result["lost"]} == {"red", "green"}
    assert {each["label"]: each["new_recall"] for each in part["classes"]} == {
        "blue": 1,
        "green": 0,
        "red": 0,
    }
    assert result["old"]["latency_ms"] > 0
    assert result["gate"]["passed"] is False
    assert "accuracy falls from 100.00% to 20.00%" in capsys.readouterr().out


def test_one_list_is_enough_but_a_note_warns(store):
    _, result = compare(store, "colours/1", "colours/4")
    assert result["parts"]["test"]["images"] == 60
    (note,) = result["notes"]
    assert "colours/4 does not list its test images; it may have been trained on some" in note


def test_a_class_of_one_model_is_stated_apart(store):
    status, result = compare(store, "colours/1", "colours/3", "--calibration", "1")
    assert status == 0
    assert result["parts"]["test"]["images"] == 60
    assert result["parts"]["test"]["difference"]["estimate"] == 0
    assert result["unshared_classes"] == [
        {"label": "gray", "known_by": "new", "images": 1, "recall": 0.0}
    ]


def test_images_that_are_gone_or_changed_are_left_out_or_searched(tmp_path, photos, capsys):
    copy = shutil.copytree(photos, tmp_path / "copy")
    store = tmp_path / "store"
    for _ in range(2):
        list_images(tiny_bundle.publish(store), sorted(copy.glob("*/*.png")))
    (copy / "red" / "00.png").unlink()
    (copy / "red" / "01.png").write_bytes(tiny_bundle.make_image("green"))
    _, result = compare(store, "colours/1", "colours/2")
    assert result["unreadable"] == 2
    assert result["parts"]["test"]["images"] == 58

    shutil.rmtree(copy)
    assert main(["compare", "colours/1", "colours/2", "--store", str(store)]) == 2
    error = capsys.readouterr().err
    assert "no test image of colours/1 and colours/2 can be read" in error
    assert "--data" in error

    moved = tmp_path / "elsewhere"
    shutil.copytree(photos, moved / "deep" / "photos")
    (moved / "deep" / "photos" / "red" / "new.png").write_bytes(
        tiny_bundle.make_image("red", seed=77)
    )
    _, result = compare(store, "colours/1", "colours/2", "--data", moved)
    assert result["parts"]["test"]["images"] == 60  # not the one that is not listed


@pytest.mark.parametrize("kind", ["folder", "folder with a test part", "CSV file"])
def test_other_labelled_images_are_given(tmp_path, store, photos, kind):
    data = tmp_path / "data"
    if kind == "folder":
        shutil.copytree(photos / "red", data / "red")
    elif kind == "CSV file":
        lines = [f"{photos}/red/{i:02d}.png,red,{'test' if i else 'train'}" for i in range(21)]
        data = tmp_path / "images.csv"
        data.write_text("\n".join(["path,label,split", *lines]))
    else:
        shutil.copytree(photos / "red", data / "test" / "red")
        shutil.copytree(photos / "blue", data / "train" / "blue")
    unlisted = tiny_bundle.publish(tmp_path / "store")
    _, result = compare(store, store / "colours" / "4", unlisted, "--data", data)
    images = result["parts"]["test"]["images"]
    assert images == (19 if kind == "CSV file" else 20)
    assert result["unreadable"] == (1 if kind == "CSV file" else 0)
    assert [each["label"] for each in result["parts"]["test"]["classes"]] == ["red"]


def test_images_that_are_not_files_lie_in_the_bundle(tmp_path, photos):
    paths = sorted(photos.glob("*/0*.png"))
    for _ in range(2):
        bundle = tiny_bundle.publish(tmp_path / "store")
        images = [path.relative_to(photos) for path in paths]
        packed = []
        for path, name in zip(paths, images, strict=True):
            packed.append(
                TestImage(
                    name=str(name),
                    label=path.parent.name,
                    sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                    part="test",
                    weight=1.0,
                    read=path.read_bytes,
                )
            )
        write_test_images(bundle, packed, is_packed=True)
        tiny_bundle.update_checksums(bundle)
    _, result = compare(tmp_path / "store", "colours/1", "colours/2")
    assert result["parts"]["test"]["images"] == 30
    assert result["unreadable"] == 0


def pack_as(flag_bits: int, method: int) -> bytes:
    """A .zip of one image, whose directory states these flags and this method of packing."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("red.png", tiny_bundle.make_image("red"))
    content = bytearray(buffer.getvalue())
    for magic, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        struct.pack_into("<HH", content, content.index(magic) + offset, flag_bits, method)
    return bytes(content)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (
            pack_as(flag_bits=1, method=0),
            "can be read; give the folder that holds them with --data",
        ),
        (
            pack_as(flag_bits=0, method=99),
            "can be read; give the folder that holds them with --data",
        ),
        (b"", "test_images.zip: File is not a zip file"),
        (b"PK\5\6" + b"\xff" * 18, "test_images.zip: "),
    ],
    ids=["encrypted", "unknown method", "empty", "damaged"],
)
def test_a_hostile_archive_in_a_bundle_is_one_line(tmp_path, photos, capsys, packed, message):
    for _ in range(2):
        bundle = tiny_bundle.publish(tmp_path)
        list_images(bundle, [photos / "red" / "00.png"])
        listed = (bundle / "test_images.csv").read_text()
        (bundle / "test_images.csv").write_text(
            listed.replace(str(photos / "red" / "00.png"), "red.png")
        )
        (bundle / "test_images.zip").write_bytes(packed)
        tiny_bundle.update_checksums(bundle)
    assert main(["compare", "colours/1", "colours/2", "--store", str(tmp_path)]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["colours/9"], "colours has no version 9; it has 1, 2, 3, 4"),
        (["colours/4"], "list no test image that both can be compared on; give labelled images"),
        (["colours/1", "--accuracy", "2"], "--accuracy: 2.0 is not in 0..1"),
        (["colours/1", "--latency", "0.5"], "--latency: 0.5 is less than 1"),
        (["colours/1", "--new-variant", "int8"], "no variant 'int8'; it has fp32"),
        (["colours/1", "--data", "gone"], "gone: can't be listed: No such file or directory"),
        (["colours/1", "--html", "gone/page.html"], "--html gone/page.html: no such directory"),
    ],
)
def test_errors_are_one_line(store, capsys, arguments, message):
    assert main(["compare", "colours/4", *arguments, "--store", str(store)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_models_without_a_common_class_are_refused(tmp_path, store, photos, capsys):
    other = tiny_bundle.publish(tmp_path, name="pets", classes=["cat", "dog", "emu"])
    arguments = ["compare", "colours/1", str(other), "--store", str(store), "--data", str(photos)]
    assert main(arguments) == 2
    assert "colours/1 and pets/1 have no class in common" in capsys.readouterr().err


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_self_contained_and_accessible(store, tmp_path, browser, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page_file = tmp_path / "page.html"
    compare(store, "colours/3", "colours/2", "--html", page_file)
    text = page_file.read_text()
    assert "http" not in text
    assert "<script" not in text

    context = browser.new_context(color_scheme=scheme, viewport={"width": 390, "height": 900})
    page = context.new_page()
    page.goto(page_file.as_uri())
    assert page.get_by_role("heading", name="Refused by the gate").is_visible()
    assert page.locator("img").count() == 40
    assert page.get_by_role("img", name="image of class red").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    violations = Axe().run(page).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in violations] == []
    context.close()


# The decision


def build_part(images: int, lost: int, gained: int, **changes: object) -> PartComparison:
    right = images // 2
    none = Difference(estimate=0, low=-0.01, high=0.01)
    fields = {
        "images": images,
        "effective_images": images,
        "old_accuracy": (right + lost) / images,
        "new_accuracy": (right + gained) / images,
        "difference": Difference.of(paired_difference(lost, gained, images, 0.95)),
        "pairs": PairCounts(
            both_right=right, lost=lost, gained=gained, both_wrong=images - right - lost - gained
        ),
        "p_exact": mcnemar_exact(lost, gained),
        "p_mid": mcnemar_mid_p(lost, gained),
        "old_log_loss": 1,
        "new_log_loss": 1,
        "log_loss_difference": none,
        "old_calibration_error": 0.02,
        "new_calibration_error": 0.02,
        "calibration_difference": none,
        "classes": [],
    }
    return PartComparison(**fields | changes)


def build_class(images: int, lost: int) -> ClassComparison:
    return ClassComparison(
        label="rose",
        images=images,
        old_recall=1,
        new_recall=1 - lost / images,
        difference=Difference.of(paired_difference(lost, 0, images, 0.99)),
    )


def build_comparison(latency_ms: float = 5, **parts: PartComparison) -> Comparison:
    old = CandidateInfo(title="a/1", network="n", variant="fp32", bytes=1, latency_ms=5)
    new = old.model_copy(update={"title": "a/2", "latency_ms": latency_ms})
    return Comparison(
        old=old,
        new=new,
        confidence=0.95,
        parts=parts,
        unshared_classes=[],
        unreadable=0,
        lost=[],
        notes=[],
    )


WORSE_CALIBRATION = {"calibration_difference": Difference(estimate=0.09, low=0.07, high=0.12)}


@pytest.mark.parametrize(
    ("comparison", "reason"),
    [
        (build_comparison(test=build_part(360, 6, 2)), None),  # may be chance
        (build_comparison(test=build_part(360, 30, 5)), "test accuracy falls from"),
        (build_comparison(test=build_part(100_000, 300, 200)), None),  # less than the budget
        (build_comparison(test=build_part(360, 0, 0, classes=[build_class(4, 1)])), None),
        (
            build_comparison(test=build_part(360, 0, 0, classes=[build_class(40, 15)])),
            "rose from 100.0% to 62.5% of 40 images",
        ),
        (
            build_comparison(test=build_part(360, 0, 0, **WORSE_CALIBRATION)),
            "the calibration error grows",
        ),
        (build_comparison(test=build_part(60, 0, 0, **WORSE_CALIBRATION)), None),  # few images
        (build_comparison(6, test=build_part(360, 0, 0)), None),
        (build_comparison(8, test=build_part(360, 0, 0)), "one image takes 8.0 ms instead of 5.0"),
        # The live test set counts where it is large enough.
        (
            build_comparison(test=build_part(360, 0, 0), live=build_part(400, 60, 0)),
            "live accuracy",
        ),
        (build_comparison(test=build_part(360, 60, 0), live=build_part(400, 0, 0)), None),
        (build_comparison(test=build_part(360, 0, 0), live=build_part(150, 60, 0)), None),
    ],
)
def test_the_gate_refuses_what_is_worse_beyond_chance_and_budget(comparison, reason):
    decision = decide(comparison, GateConfig())
    assert decision.passed == (reason is None)
    assert reason is None or reason in " ".join(decision.reasons)


@pytest.mark.parametrize("flags", [[], ["--force"]])
def test_a_refused_version_is_promoted_only_by_force(tmp_path, flags, capsys):
    for _ in range(2):
        bundle = tiny_bundle.publish(tmp_path, promote=False)
    gate = Gate(
        compared_with=1,
        passed=False,
        reasons=["test accuracy falls"],
        part="test",
        images=60,
        difference=-0.5,
        difference_low=-0.6,
        difference_high=-0.4,
    )
    tiny_bundle.edit_manifest(bundle, gate=gate.model_dump())
    tiny_bundle.update_checksums(bundle)
    assert main(["promote", "colours", "1", "--store", str(tmp_path)]) == 0
    status = main(["promote", "colours", "2", "--store", str(tmp_path), *flags])
    latest = (tmp_path / "colours" / "latest").resolve().name
    output = capsys.readouterr()
    if flags:
        assert (status, latest) == (0, "2")
        return
    assert (status, latest) == (2, "1")
    assert "colours/2 is refused by the gate, compared with version 1: test accuracy falls" in (
        output.err
    )


# Statistics


def test_mcnemar_agrees_with_published_values():
    # Fagerland, Lydersen and Laake (2013), table 1: 1 and 7 discordant pairs.
    assert mcnemar_exact(7, 1) == pytest.approx(0.0703, abs=5e-5)
    assert mcnemar_mid_p(7, 1) == pytest.approx(0.0391, abs=5e-5)
    assert mcnemar_mid_p(1, 7) == mcnemar_mid_p(7, 1)
    assert mcnemar_exact(0, 0) == mcnemar_mid_p(0, 0) == 1


def test_the_interval_of_a_difference_holds_the_true_one():
    random = np.random.default_rng(0)
    images = 300
    inside = 0
    for lost, gained, _ in random.multinomial(images, [0.06, 0.03, 0.91], 1000):
        interval = paired_difference(lost, gained, images, 0.95)
        inside += interval.low <= -0.03 <= interval.high
    assert 930 <= inside <= 975


def test_weights_make_up_for_unequal_sampling():
    """Hard images are sampled ten times as often; the weighted accuracy is that of all traffic."""
    random = np.random.default_rng(0)
    is_hard = random.random(20_000) < 0.3
    is_correct = random.random(20_000) < np.where(is_hard, 0.5, 0.95)
    probability = np.where(is_hard, 0.5, 0.05)
    inside = 0
    for _ in range(200):
        sampled = random.random(20_000) < probability
        weights = 1 / probability[sampled]
        estimate = weighted_mean(is_correct[sampled].astype(float), weights, 0.95)
        inside += estimate.low <= is_correct.mean() <= estimate.high
        assert abs(estimate.estimate - is_correct.mean()) < 0.06
        assert abs(is_correct[sampled].mean() - is_correct.mean()) > 0.1
        assert effective_images(weights) < sampled.sum() / 2
    assert 184 <= inside <= 200


def test_the_calibration_error_counts_images_by_their_weight():
    confidence = np.array([0.95, 0.95, 0.55])
    is_correct = np.array([True, True, False])
    assert calibration_error(confidence, is_correct) == pytest.approx((0.05 * 2 + 0.55) / 3)
    weights = np.array([1.0, 1.0, 8.0])
    expected = (0.05 * 2 + 0.55 * 8) / 10
    assert calibration_error(confidence, is_correct, weights) == pytest.approx(expected)
