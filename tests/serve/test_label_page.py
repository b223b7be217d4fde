"""The labelling page in a real Chromium, with `imago serve label` and its files on the disk."""

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from playwright.sync_api import expect

from models.kept import KeptFolder, Verdict, open_kept
from support import ROOT, tiny_bundle
from support.chromium import BROWSER_MS
from support.kept_images import add_answered_image
from support.server import find_free_ports, wait_until


def build_kept(root: Path, count: int = 9) -> KeptFolder:
    """Images of three colours in turn; those of one colour look alike."""
    kept = open_kept(root)
    for seed in range(count):
        axis = seed % 3
        embedding = [1.0 if i == axis else 0.001 * seed for i in range(3)]
        colour = tiny_bundle.CLASSES[axis]
        add_answered_image(
            kept, seed, colour, f"request-{seed}", confidence=0.5, embedding=embedding
        )
    return kept


@pytest.fixture(scope="module")
def start_labelling(serve_commands) -> Iterator[Callable[..., SimpleNamespace]]:
    """Start `imago serve label DIR`, at any free port unless one is given."""
    processes = []

    def start(location: Path | str, port: int = 0) -> SimpleNamespace:
        process = serve_commands.start("label", location, "--port", port, cwd=ROOT)
        processes.append(process)
        process.wait_for("stop it with Ctrl-C")
        (url,) = re.findall(r"http://127\.0\.0\.1:\d+/", process.text)
        return SimpleNamespace(url=url, process=process)

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture
def open_page(browser) -> Iterator[Callable[..., object]]:
    """`open_page(url, who)`: the page of a person. Errors and other hosts fail the test."""
    contexts = []
    errors: list[str] = []

    def open_url(url: str, who: str = "ann", width: int = 1280, **options: object):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        context.set_default_timeout(BROWSER_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))

        def check_request(request) -> None:
            if not request.url.startswith((url, "blob:", "data:")):
                errors.append(request.url)

        page.on("request", check_request)
        page.goto(f"{url}label")
        page.get_by_label("Your name").fill(who)
        page.get_by_role("button", name="Start").click()
        page.locator("#image[src^='blob:']").wait_for()
        return page

    yield open_url
    for context in contexts:
        context.close()
    assert not errors


@pytest.fixture
def labelling(start_labelling, tmp_path) -> SimpleNamespace:
    kept = build_kept(tmp_path / "kept")
    running = start_labelling(kept.location)
    return SimpleNamespace(kept=kept, **vars(running))


def read_labels(kept: KeptFolder) -> list[tuple[str, str, str]]:
    """Return verdict, class and person of each label that counts."""
    labels = [label for label, _ in open_kept(kept.location).read_labels().values()]
    return sorted((label.verdict.value, label.label, label.who) for label in labels)


def expect_status(page, text: str) -> None:
    expect(page.get_by_role("status")).to_contain_text(text)


def read_guess(page) -> str:
    """Return the guess of the image on the page."""
    return page.locator("#classes button.guess span").first.inner_text()


def test_images_are_labelled_with_the_keyboard(labelling, open_page):
    page = open_page(labelling.url)
    first = read_guess(page)
    page.keyboard.press("1")
    expect_status(page, f"Labelled {first}. Next: The model's guess is")
    page.keyboard.press("0")
    expect_status(page, "Labelled none of these.")
    page.keyboard.press("-")
    expect_status(page, "Labelled not an image of ours.")
    page.keyboard.press("ArrowRight")
    expect_status(page, "Skipped.")
    expect(page.locator("#progress-text")).to_have_text("3 of 9 labelled")
    expected = sorted([("class", first, "ann"), ("none", "", "ann"), ("foreign", "", "ann")])
    wait_until(lambda: read_labels(labelling.kept) == expected)

    page.keyboard.press("Backspace")
    expect_status(page, "Undone.")
    wait_until(lambda: len(read_labels(labelling.kept)) == 2)
    expect(page.locator("#progress-text")).to_have_text("2 of 9 labelled")


def test_classes_are_found_by_typing_and_new_ones_added(labelling, open_page):
    page = open_page(labelling.url)
    page.keyboard.type("blu")
    expect(page.locator("#classes button").first).to_contain_text("blue")
    page.keyboard.press("Enter")
    expect_status(page, "Labelled blue.")

    page.keyboard.type("dark purple")
    expect(page.locator("#classes button")).to_have_text(["1New class “dark purple”"])
    page.keyboard.press("Enter")
    expect_status(page, "Labelled dark purple.")
    page.keyboard.type("dark")
    expect(page.locator("#classes button").first).to_contain_text("dark purple")
    page.keyboard.press("Escape")
    expected = [("class", "blue", "ann"), ("class", "dark purple", "ann")]
    wait_until(lambda: read_labels(labelling.kept) == expected)


def test_look_alikes_are_confirmed_together(labelling, open_page):
    page = open_page(labelling.url)
    guess = read_guess(page)
    page.get_by_role("button", name="Look-alikes").click()
    boxes = page.locator("#alike input")
    expect(boxes).to_have_count(2)
    boxes.first.uncheck()
    page.get_by_role("button", name=guess).click()
    expect_status(page, f"Labelled {guess} and 1 look-alike.")
    wait_until(lambda: read_labels(labelling.kept) == [("class", guess, "ann")] * 2)
    page.get_by_role("button", name="Undo").click()
    wait_until(lambda: read_labels(labelling.kept) == [])


def test_labels_survive_the_death_of_the_server_and_of_the_page(
    tmp_path, start_labelling, open_page
):
    kept = build_kept(tmp_path / "kept")
    (port,) = find_free_ports(1)
    running = start_labelling(kept.location, port)
    page = open_page(running.url)
    running.process.send_signal(signal.SIGKILL)
    running.process.wait()
    page.keyboard.press("1")
    page.keyboard.press("0")
    expect(page.locator("#unsaved")).to_contain_text("2 not saved yet")
    assert read_labels(kept) == []

    start_labelling(kept.location, port)
    second = page.context.new_page()  # the first page ends without sending anything
    page.close()
    second.goto(f"{running.url}label")
    second.locator("#image[src^='blob:']").wait_for()
    wait_until(lambda: len(read_labels(kept)) == 2)
    expect(second.locator("#unsaved")).to_be_hidden()


def test_two_people_label_at_once(labelling, open_page):
    ann = open_page(labelling.url, "ann")
    bob = open_page(labelling.url, "bob")
    for _ in range(9):
        for page in (ann, bob):
            if page.locator("#main").is_visible():
                page.keyboard.press("1")
    wait_until(lambda: len(read_labels(labelling.kept)) == 9)
    files = Path(labelling.kept.location, "labels").iterdir()
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert {line["who"] for line in lines} == {"ann", "bob"}
    assert all(line["verdict"] == Verdict.CLASS for line in lines)


def test_a_page_of_another_version_keeps_its_labels(labelling, open_page):
    page = open_page(labelling.url)

    def send_as_another_version(route) -> None:
        route.continue_(post_data=re.sub('"page":"[^"]*"', '"page":"old"', route.request.post_data))

    page.route("**/label/labels", send_as_another_version)
    page.keyboard.press("1")
    expect(page.locator("#unsaved")).to_contain_text("reload it")
    assert read_labels(labelling.kept) == []
    page.unroute("**/label/labels")
    page.reload()
    wait_until(lambda: len(read_labels(labelling.kept)) == 1)


def test_a_label_of_an_image_that_is_gone_is_told(labelling, open_page):
    page = open_page(labelling.url)
    for image in labelling.kept.read_images().values():
        labelling.kept.files.remove(image.file)
    with page.expect_response("**/label/labels") as sent:
        page.keyboard.press("1")
    assert len(sent.value.json()["gone"]) == 1
    expect_status(page, "image is gone")


def test_the_order_is_stated_and_can_be_changed(labelling, open_page):
    page = open_page(labelling.url)
    page.get_by_text("Order now: What teaches most first").click()
    images = list(labelling.kept.read_images().values())
    with page.expect_request("**/label/images/*"):
        page.locator("#order").select_option("newest")
    page.get_by_text("Order now: Newest first").wait_for()
    newest = images[-1].top[0].label
    expect(page.locator("#classes button.guess")).to_contain_text(newest)


def test_the_page_of_a_service_asks_for_the_key_and_labels_become_accuracy(
    start, browser, tmp_path
):
    kept = open_kept(tmp_path / "kept")
    add_answered_image(kept, 0, "red", confidence=0.9)
    server = start("--keep", kept.location, "--api-key", "secret", "--keep-days", "0")
    context = browser.new_context()
    context.set_default_timeout(BROWSER_MS)
    page = context.new_page()
    page.goto(f"{server.url}/label")
    page.get_by_label("Your name").fill("ann")
    page.get_by_role("button", name="Start").click()
    expect_status(page, "This page needs the API key.")
    page.get_by_label("API key").fill("secret")
    page.get_by_role("button", name="Start").click()
    page.locator("#image[src^='blob:']").wait_for()
    page.keyboard.press("1")
    wait_until(lambda: "imago_feedback_accuracy 1.0" in server.metrics())
    assert server.metric("imago_feedback_ece") == pytest.approx(0.1)
    assert read_labels(kept) == [("class", "red", "ann")]
    context.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_follows_the_colour_scheme(labelling, open_page, width):
    page = open_page(labelling.url, width=width, has_touch=width < 500)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    means = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        pixels = cv2.imdecode(np.frombuffer(page.screenshot(), np.uint8), cv2.IMREAD_GRAYSCALE)
        means.append(pixels.mean())
    assert means[0] > means[1] + 60
    small = page.evaluate(
        "[...document.querySelectorAll('main button')].filter(b => b.offsetParent && "
        "b.getBoundingClientRect().height < 44).length"
    )
    assert small == 0
    if width < 500:
        page.locator("#classes button").first.tap()
        expect_status(page, "Labelled")


def test_the_page_is_accessible(labelling, open_page):
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(labelling.url, bypass_csp=True)  # axe runs by eval
    page.locator("#order-summary").click()
    page.get_by_role("button", name="Look-alikes").click()
    page.locator("#alike input").first.wait_for()
    violations = Axe().run(page).response["violations"]
    assert [violation["id"] for violation in violations] == []
    assert page.get_by_role("img", name="The model's guess is").count() >= 1
