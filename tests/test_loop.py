"""The loop: doubtful images are kept, labelled, trained on, compared and promoted."""

import base64
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

from models.bundle import Bundle
from models.kept import Reason, open_kept
from models.store import Store
from support import RANDOM_CONVNET, ROOT
from support.forked_commands import ForkedCommand, ForkedCommands
from support.hot_reload import FAST_RELOAD
from support.s3_server import s3_server
from support.sample_images import CLASSES, make_pixels, write_image_folder
from support.server import Server, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

API_KEY = {"X-API-Key": "secret"}
AWS_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
)
FIRST_DRIFTED = 1000  # seed of the first image that the service keeps
FIRST_HELD_OUT = 2000  # of the first one that only measures
HELD_OUT = 20  # images a class
KEPT = 16  # images a class

# Scripts of the browser: whether another image than `shown` is on the page, its pixels, and whether
# the server has all labels.
SHOWS_NEXT = """shown => {
    const image = document.getElementById("image");
    const isLoaded = image.complete && image.src && image.src !== shown;
    return isLoaded || !document.getElementById("done").hidden;
}"""
READ_IMAGE = """() => {
    const image = document.getElementById("image");
    const canvas = document.createElement("canvas");
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    canvas.getContext("2d").drawImage(image, 0, 0);
    return canvas.toDataURL("image/png");
}"""
HAS_SENT_ALL = """() => {
    const items = Object.keys(localStorage);
    return !items.some((item) => item.startsWith("imago-unsaved-labels"));
}"""


def make_negative(label: int, seed: int) -> bytes:
    """An image as a broken camera sends it: with the complement of each colour."""
    return cv2.imencode(".png", 255 - make_pixels(label, seed))[1].tobytes()


def recognise_negative(pixels: np.ndarray) -> str:
    """Return the class of BGR pixels, as a person sees it."""
    return CLASSES[pixels.mean((0, 1)).argmin()]


@dataclass
class Home:
    """A store with versions of the model `photos`, and where its trainings work."""

    commands: ForkedCommands
    directory: Path

    @property
    def store(self) -> Path:
        return self.directory / "store"

    def train(self, data: object, *flags: object, env: dict[str, str] | None = None) -> str:
        """Run `python -m train run DATA` and return its output."""
        return self.start(data, *flags, env=env, status=0).text

    def start(
        self, data: object, *flags: object, env: dict[str, str] | None = None, status: int = 0
    ) -> ForkedCommand:
        """Run `python -m train run DATA`, which ends with `status`."""
        command = self.commands.start(
            *("run", data, "--name", "photos", "--store", self.store),
            *("--trainer.default_root_dir", self.directory / "runs"),
            *("--data.cache", self.directory / "cache", "--trainer.accelerator", "cpu"),
            *("--audit.enabled", "false", "--export.report", "false", "--logger", "none"),
            *("--export.quantize.enabled", "false", "--progress.quiet", "true"),
            *("--samples.images", 0, *flags),
            cwd=ROOT,
            env=env,
        )
        assert command.wait() == status, command.text
        return command

    def open_latest(self) -> Bundle:
        return Bundle(self.store / "photos" / "latest")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("loop") / "photos", 40)


@pytest.fixture(scope="module")
def first(commands: ForkedCommands, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a store whose first version is trained on the photos."""
    home = Home(commands, tmp_path_factory.mktemp("first"))
    home.train(photos, *RANDOM_CONVNET, "--trainer.max_epochs", 10)
    return home.directory


@pytest.fixture(params=["directory", "bucket"])
def kept_location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where the service keeps images."""
    if request.param == "directory":
        yield str(tmp_path / "kept")
        return
    with s3_server("bucket"):
        yield "s3://bucket/kept"


def answer_held_out(server: Server) -> tuple[float, str]:
    """Return the accuracy of the service on drifted images that it does not keep, and the version.

    They are sent as pixels, which are not kept.
    """
    pixels: list[np.ndarray] = []
    expected: list[str] = []
    for seed in range(FIRST_HELD_OUT, FIRST_HELD_OUT + HELD_OUT):
        for label, name in enumerate(CLASSES):
            pixels.append(255 - make_pixels(label, seed)[..., ::-1])
            expected.append(name)
    images = np.stack(pixels)
    tensor = {"name": "image", "datatype": "UINT8", "shape": images.shape}
    response = server.http.post(
        "/v2/models/photos/infer",
        json={"inputs": [{**tensor, "data": images.ravel().tolist()}]},
        headers=API_KEY,
    )
    answer = response.json()
    (labels,) = [output["data"] for output in answer["outputs"] if output["name"] == "label"]
    return float(np.mean(np.array(labels) == expected)), answer["model_version"]


def label_all(browser: "Browser", url: str) -> int:
    """Label all images on /label by looking at each and pressing a key; return how many."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{url}/label")
    page.get_by_label("Your name").fill("ann")
    page.get_by_role("button", name="Start").click()
    page.get_by_label("API key").fill(API_KEY["X-API-Key"])
    page.get_by_role("button", name="Start").click()

    count = 0
    shown = ""
    while True:
        page.wait_for_function(SHOWS_NEXT, arg=shown)
        if page.locator("#done").is_visible():
            break
        shown = page.locator("#image").get_attribute("src")
        name = recognise_negative(read_shown_pixels(page))
        names = page.locator("#classes button span:not(.share)").all_inner_texts()
        page.keyboard.press(str(names.index(name) + 1))
        count += 1
    page.wait_for_function(HAS_SENT_ALL)
    context.close()
    return count


def read_shown_pixels(page: "Page") -> np.ndarray:
    """Return the BGR pixels of the image on the page."""
    _, _, encoded = page.evaluate(READ_IMAGE).partition(",")
    png = np.frombuffer(base64.b64decode(encoded), np.uint8)
    return cv2.imdecode(png, cv2.IMREAD_COLOR)


@pytest.mark.slow
def test_drifted_images_improve_the_running_service(
    first: Path,
    photos: Path,
    kept_location: str,
    commands: ForkedCommands,
    start: Callable[..., Server],
    browser: "Browser",
    tmp_path: Path,
    record_property: Callable[[str, object], None],
):
    """A camera breaks: a version trained on its kept and labelled images is served."""
    home = Home(commands, shutil.copytree(first, tmp_path / "home", symlinks=True))
    env = {name: os.environ[name] for name in AWS_VARIABLES if kept_location.startswith("s3:")}
    server = start(
        *("--keep", kept_location, "--keep-share", "1", "--keep-free-bytes", "1"),
        *("--api-key", API_KEY["X-API-Key"], *FAST_RELOAD),
        store=home.store,
        env=env,
    )
    before, version = answer_held_out(server)
    assert version == "1"
    assert before < 0.5

    for seed in range(FIRST_DRIFTED, FIRST_DRIFTED + KEPT):
        for label in range(len(CLASSES)):
            answer = server.predict(make_negative(label, seed), **API_KEY)
            assert answer.status_code == 200
    kept = open_kept(kept_location)
    wait_until(lambda: len(kept.read_images()) == KEPT * len(CLASSES))
    assert any(Reason.OUT_OF_DISTRIBUTION in image.reasons for image in kept.read_images().values())

    assert label_all(browser, server.url) == KEPT * len(CLASSES)
    wait_until(lambda: len(kept.read_labels()) == KEPT * len(CLASSES))

    data = f"{photos},kept:{kept_location}"
    flags = (*RANDOM_CONVNET, "--export.gate.live_images", 10)
    home.train(data, *flags, "--trainer.max_epochs", 40, "--model.optimizer.lr", 5e-3, env=env)
    wait_until(lambda: answer_held_out(server)[1] == "2")
    after, _ = answer_held_out(server)
    gate = home.open_latest().manifest.gate
    assert gate is not None
    assert gate.passed
    assert gate.part == "live"
    assert gate.difference > 0.3
    record_property("accuracy_before", before)
    record_property("accuracy_after", after)
    assert after > before + 0.4

    # A version that has learned nothing is refused, and the service keeps the good one.
    refused = home.start(
        data, *flags, "--trainer.max_epochs", 1, "--model.optimizer.lr", 1e-9, env=env, status=3
    )
    assert "photos/3 is not promoted, version 2 stays the latest" in refused.text
    assert Store(home.store).latest("photos") == 2
    assert answer_held_out(server) == (after, "2")


@pytest.mark.slow
def test_a_new_class_passes_the_gate_by_the_probe(
    commands: ForkedCommands,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
):
    """With the embedded network; the class comes between the others, whose test images stay."""
    home = Home(commands, tmp_path)
    photos = write_image_folder(tmp_path / "photos", 24, 48)
    added = photos.rename(tmp_path / "all") / "green"
    photos.mkdir()
    for name in ("blue", "red"):
        (tmp_path / "all" / name).rename(photos / name)
    flags = ("--fit.mode", "probe", "--data.size", 96)
    home.train(photos, *flags)
    old_test = home.open_latest().manifest.test_metrics

    added.rename(photos / "green")
    start = time.monotonic()
    printed = home.train(photos, *flags)
    record_property("seconds", time.monotonic() - start)
    assert "embeddings of 24 images are computed; 48 are in the cache" in printed

    manifest = home.open_latest().manifest
    assert manifest.version == 2
    assert manifest.network == "tf_efficientnet_lite0"
    assert manifest.classes == CLASSES
    assert manifest.gate is not None
    assert manifest.gate.passed
    assert manifest.gate.images == old_test.images
    (note,) = [note for note in manifest.notes if note.startswith("class green is added: ")]
    assert note.endswith(f"of {manifest.test_metrics.per_class[1].support} images")
    assert manifest.test_metrics.per_class[1].recall > 0.5
