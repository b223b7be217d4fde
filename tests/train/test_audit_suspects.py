"""The audit's suspicious labels on the labelling page: answers become corrections of the data."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import cv2
import httpx
import pytest
from sklearn.datasets import load_digits

from support import RANDOM_CONVNET

WRONG = 5  # labels


@pytest.fixture(scope="module")
def audited(commands, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """Digits 0 and 6 in two folders, some of them in the wrong one, audited and served."""
    root = tmp_path_factory.mktemp("suspects")
    digits = load_digits()
    photos = root / "photos"
    for k, digit in enumerate((0, 6)):
        rows = (digits.target == digit).nonzero()[0][:50]
        for i, row in enumerate(rows):
            is_wrong = digit == 0 and i < WRONG
            label = ("zero", "six")[1 - k if is_wrong else k]
            folder = photos / label
            folder.mkdir(parents=True, exist_ok=True)
            pixels = cv2.resize((digits.images[row] * 15).astype("uint8"), (32, 32))
            cv2.imwrite(str(folder / f"{digit}-{i:03d}.png"), pixels)

    command = commands.start(
        *("audit", photos, "--out", root / "report", "--data.size", 16, "--serve", "--port", 0),
        *RANDOM_CONVNET,
    )
    command.wait_for("stop it with Ctrl-C")
    (url,) = re.findall(r"(http://127\.0\.0\.1:\d+/) saves", command.text)
    with httpx.Client(base_url=url, timeout=60) as http:
        yield SimpleNamespace(http=http, file=photos / "corrections.csv")
    command.kill()
    command.wait()


def read_corrections(file: Path) -> dict[str, tuple[str, str]]:
    with file.open(newline="") as lines:
        return {row["path"]: (row["action"], row["label"]) for row in csv.DictReader(lines)}


def label(audited: SimpleNamespace, item_id: str, verdict: str, name: str = "") -> httpx.Response:
    page = audited.http.get("/label/items").json()["page"]
    entry = {"id": item_id, "verdict": verdict, "label": name, "who": "ann"}
    return audited.http.post("/label/labels", json={"page": page, "labels": [entry]})


def test_suspicious_labels_are_shown_and_corrected(audited):
    state = audited.http.get("/label/items").json()
    assert state["classes"] == ["six", "zero"]
    wrong = [item for item in state["items"] if Path(item["id"]).name.startswith("0-00")]
    assert len(wrong) >= 3
    first, second, third = wrong[:3]
    assert first["training_label"] == "six"
    assert first["guesses"][0]["label"] == "zero"
    image = audited.http.get(f"/label/images/{first['id']}")
    assert image.headers["content-type"] == "image/png"

    assert label(audited, first["id"], "class", "zero").json()["saved"] == 1
    label(audited, second["id"], "class", "six")
    label(audited, third["id"], "foreign")
    assert read_corrections(audited.file) == {
        first["id"]: ("relabel", "zero"),
        second["id"]: ("keep", ""),
        third["id"]: ("leave out", ""),
    }
    assert audited.http.get("/label/items").json()["labelled"] == 3

    label(audited, third["id"], "withdrawn")
    assert third["id"] not in read_corrections(audited.file)


def test_a_class_that_the_data_lacks_is_refused(audited):
    item = audited.http.get("/label/items").json()["items"][0]
    response = label(audited, item["id"], "class", "seven")
    assert response.status_code == 400
    assert "not a class" in response.json()["detail"]


def test_an_image_that_is_not_suspicious_is_reported_as_gone(audited):
    assert label(audited, "six/none.png", "class", "six").json()["gone"] == ["six/none.png"]


def test_both_pages_show_the_same_corrections(audited):
    item = audited.http.get("/label/items").json()["items"][-1]
    correction = {"path": item["id"], "action": "relabel", "label": "zero"}
    audited.http.post("/corrections", json={"corrections": [correction]})
    shown = audited.http.get("/label/items", params={"show": "labelled"}).json()["items"]
    labels = {entry["id"]: entry["label"]["label"] for entry in shown}
    assert labels[item["id"]] == "zero"
    assert 'href="label"' in audited.http.get("/").text
