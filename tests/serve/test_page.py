"""The page in a real Chromium, driven by Playwright, against a real server."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from playwright.sync_api import expect

from models.bundle import Calibration, write_checksums
from support import tiny_bundle
from support.chromium import BROWSER_MS
from support.server import Server

PASTE = """([name, bytes]) => {
  const files = new DataTransfer();
  files.items.add(new File([new Uint8Array(bytes)], name, {type: 'image/png'}));
  document.dispatchEvent(
    new ClipboardEvent('paste', {clipboardData: files, bubbles: true, cancelable: true}));
}"""
DROP = """([name, bytes]) => {
  const files = new DataTransfer();
  files.items.add(new File([new Uint8Array(bytes)], name, {type: 'image/png'}));
  document.getElementById('drop').dispatchEvent(
    new DragEvent('drop', {dataTransfer: files, bubbles: true, cancelable: true}));
}"""


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode uint8 [H, W, C] in BGR."""
    return cv2.imencode(".png", pixels)[1].tobytes()


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A model with thresholds and a report: it abstains on dark images; gray ones are unusual."""
    store = tmp_path_factory.mktemp("page")
    path = tiny_bundle.publish(
        store,
        calibration=Calibration(
            abstain_threshold=0.9,
            conformal_level=0.9,
            conformal_quantile=0.9,
            energy_threshold=-3.0,
        ),
    )
    (path / "report.html").write_text(
        "<!doctype html><title>Report</title><style>p{color:red}</style><p>Accuracy of the model"
        "<script>document.title = 'a script ran'</script>"
    )
    write_checksums(path)
    return store


@pytest.fixture(scope="module")
def service(store, serve_commands, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "log"
    with Server(store, log, forker=serve_commands) as running:
        yield running.wait_ready()


@pytest.fixture(scope="module")
def tab(browser, service) -> Iterator:
    """A tab of the browser, which takes more CPU time to open than a page to load."""
    # Without motion, so that widths do not change while they are read.
    context = browser.new_context(base_url=service.url, reduced_motion="reduce")
    context.set_default_timeout(BROWSER_MS)
    opened = context.new_page()
    opened.service = service
    yield opened
    context.close()


@pytest.fixture
def page(tab) -> Iterator:
    """The loaded page. An error in its console or a request to another host fails the test."""
    url = tab.service.url
    errors: list[str] = []

    def check_error(error) -> None:
        errors.append(str(error))

    def check_console(message) -> None:
        if message.type == "error":
            errors.append(message.text)

    def check_request(request) -> None:
        if not request.url.startswith((url, "blob:", "data:")):
            errors.append(request.url)

    listeners = {
        "console": check_console,
        "pageerror": check_error,
        "request": check_request,
    }
    for event, listener in listeners.items():
        tab.on(event, listener)
    tab.set_viewport_size({"width": 1200, "height": 800})
    tab.emulate_media(color_scheme="light")
    tab.goto("/")
    tab.locator("#strip button").first.wait_for()
    tab.errors = errors
    yield tab
    tab.unroute_all()
    tab.context.clear_permissions()
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert not errors


def pop_error(page) -> str:
    """Wait for an error in the console, and remove it from those that fail the test."""
    while not page.errors:
        page.wait_for_timeout(20)
    return page.errors.pop()


def wait_for_card(page, name: str):
    """Wait until the newest card is that of the file `name`, and return it."""
    card = page.locator("article").first
    card.locator(".file", has_text=name).wait_for()
    return card


@pytest.mark.parametrize("secure", [True, False], ids=["secure", "plain HTTP"])
def test_the_curl_command_is_copied(page, secure):
    if secure:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    else:
        page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.locator("#strip button").first.click()
    card = page.locator("article").first
    card.locator("summary").first.click()
    command = card.locator("pre").inner_text()
    card.locator(".copy").click()
    if secure:
        card.get_by_role("button", name="Copied").wait_for()
        assert page.evaluate("navigator.clipboard.readText()") == command
    else:
        card.get_by_role("button", name=re.compile("Copied|Selected")).wait_for()
        assert page.evaluate("getSelection().toString()") == command


def test_picked_images_are_classified(page, tmp_path):
    for label in tiny_bundle.CLASSES:
        (tmp_path / f"{label}.png").write_bytes(tiny_bundle.make_image(label, size=64))
    page.set_input_files("#files", [tmp_path / f"{label}.png" for label in tiny_bundle.CLASSES])
    page.get_by_role("status").get_by_text("3 images answered").wait_for()
    names: list[str] = []
    for card in page.locator("article").all():
        name = card.locator(".file").inner_text().removesuffix(".png")
        assert card.locator(".label").inner_text().split()[0] == name
        names.append(name)
    assert names == tiny_bundle.CLASSES


def test_results_appear_in_the_order_of_the_files(page, tmp_path):
    """More files than requests at once; the answer to the first one comes last."""
    names = [f"{i}.png" for i in range(30)]
    for name in names:
        (tmp_path / name).write_bytes(tiny_bundle.make_image("red"))
    held: list = []

    def hold_first(route) -> None:
        if held:
            route.continue_()
        else:
            held.append(route)

    page.route("**/predict?*", hold_first)
    page.set_input_files("#files", [tmp_path / name for name in names])
    page.locator("article").nth(28).wait_for()
    held[0].continue_()
    page.get_by_role("status").get_by_text("30 images answered").wait_for()
    assert page.locator("article .file").all_inner_texts() == names


def test_a_card_shows_the_whole_prediction(page, tmp_path):
    (tmp_path / "it's.png").write_bytes(tiny_bundle.make_image("green", size=64))
    page.set_input_files("#files", tmp_path / "it's.png")
    card = wait_for_card(page, "it's.png")
    (prediction,) = page.service.predict((tmp_path / "it's.png").read_bytes()).json()["predictions"]
    bars = card.locator(".bars li").all()
    names = [bar.locator(".name").inner_text() for bar in bars]
    assert names == [choice["label"] for choice in prediction["top"]]
    assert bars[0].locator(".share").inner_text() == f"{100 * prediction['confidence']:.1f} %"
    widths = [bar.locator(".fill").bounding_box()["width"] for bar in bars]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 0.9 * bars[0].locator(".track").bounding_box()["width"]
    assert card.locator(".set").inner_text() == "Prediction set: green"
    timings = card.locator(".timings").inner_text()
    for step in ("queue", "decode", "infer", "round\u00a0trip"):
        assert step in timings
    assert card.locator(".badges li").count() == 0
    page.get_by_role("status").get_by_text("it's.png: green").wait_for()


def test_the_curl_command_gives_the_same_answer(page, tmp_path):
    (tmp_path / "it's one.png").write_bytes(tiny_bundle.make_image("blue"))
    page.set_input_files("#files", tmp_path / "it's one.png")
    card = wait_for_card(page, "it's one.png")
    card.get_by_text("The same request with curl").click()
    result = subprocess.run(
        card.locator("pre").inner_text(), shell=True, cwd=tmp_path, capture_output=True, check=True
    )
    (prediction,) = json.loads(result.stdout)["predictions"]
    assert prediction["label"] == "blue"
    assert prediction["cam"]


def test_warnings_are_shown_and_announced(page, tmp_path):
    (tmp_path / "gray.png").write_bytes(encode_png(np.full((32, 32, 3), 9, np.uint8)))
    page.set_input_files("#files", tmp_path / "gray.png")
    card = wait_for_card(page, "gray.png")
    assert card.locator(".label").inner_text().startswith("Not sure, perhaps ")
    abstains, unusual = card.locator(".badges li").all_inner_texts()
    assert abstains.startswith("Abstains: the confidence is below 90.0 %")
    assert unusual.startswith("Out of distribution: ")
    page.get_by_role("status").get_by_text("abstains").wait_for()


@pytest.mark.parametrize("script", [PASTE, DROP], ids=["paste", "drop"])
def test_images_can_be_pasted_and_dropped(page, script):
    page.evaluate(script, ["blue.png", list(tiny_bundle.make_image("blue"))])
    assert wait_for_card(page, "blue.png").locator(".label").inner_text().startswith("blue")


def test_samples_work_with_the_keyboard(page):
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#strip') !== null"):
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    card = wait_for_card(page, "true class green")
    assert card.locator(".label").inner_text().startswith("green")
    assert page.evaluate(
        "[...document.querySelectorAll('#strip img')].every(i => i.complete && i.naturalWidth > 0)"
    )


def test_the_heat_map_covers_the_input_of_the_network(page, tmp_path):
    wide = np.zeros((100, 300, 3), np.uint8)
    # Red, in the upper half of the centre. The network receives the centre.
    wide[:50, 100:200, 2] = 255
    (tmp_path / "wide.png").write_bytes(encode_png(wide))
    page.set_input_files("#files", tmp_path / "wide.png")
    card = wait_for_card(page, "wide.png")
    heat = card.locator("canvas.heat")
    heat.wait_for(state="visible")
    # Both at once, since the page may move while images are loaded.
    photo, covered = card.evaluate(
        "card => [...card.querySelectorAll('.photo, canvas.heat')]"
        ".sort((a, b) => a.matches('canvas') - b.matches('canvas'))"
        ".map(element => element.getBoundingClientRect().toJSON())"
    )
    assert covered["width"] == pytest.approx(photo["width"] / 3, rel=0.02)
    assert covered["x"] == pytest.approx(photo["x"] + photo["width"] / 3, abs=2)
    alpha = heat.evaluate(
        "c => { const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return [d[3 + 4 * c.width * 2 + 8], d[3 + 4 * c.width * (c.height - 3) + 8]] }"
    )
    assert alpha == [255, 0]
    card.get_by_label("Heat map").uncheck()
    assert not heat.is_visible()


def test_a_file_that_is_not_an_image_gets_a_message(page, tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    page.set_input_files("#files", tmp_path / "notes.png")
    page.get_by_role("status").get_by_text(
        "not a JPEG, PNG, WebP, AVIF, BMP, GIF or TIFF"
    ).wait_for()
    assert "error" in page.locator("#status").get_attribute("class")
    assert "415" in pop_error(page)  # logged by the browser


def test_a_failed_image_among_many_has_its_own_message(page, tmp_path):
    files = {
        "one.png": tiny_bundle.make_image("red"),
        "notes.png": b"no image",
        "two.png": tiny_bundle.make_image("blue"),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    page.set_input_files("#files", [tmp_path / name for name in files])
    page.get_by_role("status").get_by_text("2 of 3 images answered").wait_for()
    assert "error" in page.locator("#status").get_attribute("class")
    cards = {card.locator(".file").inner_text(): card for card in page.locator("article").all()}
    assert set(cards) == set(files)
    failed = cards["notes.png"]
    assert failed.locator(".label").inner_text() == "No answer"
    assert "not a JPEG" in failed.locator(".badges li.error").inner_text()
    failed.get_by_text("can't show the file").wait_for()
    assert "415" in pop_error(page)  # logged by the browser


@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_follows_the_colour_scheme(page, width):
    page.set_viewport_size({"width": width, "height": 700})
    means = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        pixels = cv2.imdecode(np.frombuffer(page.screenshot(), np.uint8), cv2.IMREAD_GRAYSCALE)
        means.append(pixels.mean())
    assert means[0] > 200
    assert means[1] < 60


def test_an_image_that_the_browser_cannot_show_is_classified(page, tmp_path):
    png = np.frombuffer(tiny_bundle.make_image("red", size=64), np.uint8)
    pixels = cv2.imdecode(png, cv2.IMREAD_COLOR)
    (tmp_path / "scan.tiff").write_bytes(cv2.imencode(".tiff", pixels)[1].tobytes())
    page.set_input_files("#files", tmp_path / "scan.tiff")
    card = wait_for_card(page, "scan.tiff")
    assert card.locator(".label").inner_text().startswith("red")
    card.get_by_text("can't show the image").wait_for()


def test_controls_have_names_and_links_work(page):
    for role in ("button", "link", "textbox", "checkbox", "spinbutton"):
        for control in page.get_by_role(role).all():
            assert control.evaluate(
                "e => e.labels?.length > 0 || (e.textContent || e.ariaLabel || '').trim() !== ''"
                " || e.querySelector('img[alt]:not([alt=\"\"])') !== null"
            ), control
    assert page.get_by_role("heading", level=1).count() == 1
    page.get_by_role("link", name="API").click()
    page.get_by_text("/predict").first.wait_for()
    page.goto("/")
    page.get_by_role("link", name="Model report").click()
    page.get_by_text("Accuracy of the model").wait_for()
    assert page.title() == "Report"
    # Chromium logs that it did not run the script of the report.
    assert "script" in pop_error(page).lower()


def test_docs_can_be_tried_out(page, tmp_path):
    page.goto("/docs")
    predict = page.locator("form[data-path='/predict']")
    predict.get_by_label("top_k").fill("1")
    predict.get_by_role("button", name="Send").click()  # sends the example
    predict.get_by_text('"label": "red"').first.wait_for()
    assert predict.locator("output").inner_text().startswith("200 OK")

    for label in ("green", "blue"):
        (tmp_path / label).write_bytes(tiny_bundle.make_image(label))
    predict.get_by_label("Images").set_input_files([tmp_path / "green", tmp_path / "blue"])
    predict.get_by_role("button", name="Send").click()
    for label in ("green", "blue"):
        predict.get_by_text(f'"label": "{label}"').first.wait_for()

    code = page.locator("details[data-code='post /predict'] pre[data-language=JavaScript]")
    program = code.text_content().replace("console.log(", "return (")
    answer = page.evaluate(f"async () => {{ {program} }}")
    assert answer["predictions"][0]["label"] == "green"

    infer = page.locator("form[data-path='/v2/models/{name}/infer']")
    infer.get_by_role("button").click()  # the name of the model is filled in
    infer.get_by_text('"model_name": "colours"').wait_for()
    page.locator("form[data-path='/samples/{index}']").get_by_role("button").click()
    page.get_by_text("bytes of image/png").wait_for()


@pytest.mark.parametrize("width", [320, 390, 768])
def test_the_page_fits_the_width_of_the_screen(page, tmp_path, width):
    (tmp_path / ("long-name-" * 9 + ".png")).write_bytes(tiny_bundle.make_image("red", size=64))
    page.set_viewport_size({"width": width, "height": 700})
    page.set_input_files("#files", next(tmp_path.glob("long*")))
    wait_for_card(page, "long").get_by_text("The same request").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.goto("/docs")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_asks_for_the_api_key(browser, start, store, tmp_path):
    server = start("--api-key", "secret", store=store)
    context = browser.new_context(base_url=server.url)
    context.set_default_timeout(BROWSER_MS)
    opened = context.new_page()
    opened.goto("/")
    opened.get_by_role("status").get_by_text("needs an API key").wait_for()
    opened.keyboard.type("secrets")  # the field has the focus
    opened.keyboard.press("Enter")
    opened.get_by_role("status").get_by_text("API key is wrong").wait_for()
    opened.get_by_label("API key").fill("secret")
    opened.get_by_role("button", name="Continue").click()
    opened.locator("#strip button").first.click()
    opened.get_by_role("status").get_by_text("red,").wait_for()
    card = wait_for_card(opened, "true class red")
    assert card.locator(".label").inner_text().startswith("red")
    assert "secret" not in card.locator("pre").text_content()
    assert "$IMAGO_API_KEY" in card.locator("pre").text_content()

    opened.reload()  # the key is kept for this tab
    images = opened.locator("#strip img")
    images.nth(15).wait_for()
    for i in range(images.count()):
        # Not `wait_for_function`: it polls with eval, which the page's policy forbids.
        expect(images.nth(i)).not_to_have_js_property("naturalWidth", 0)
    assert not opened.get_by_label("API key").is_visible()

    opened.get_by_role("link", name="Model report").click()
    report = opened.get_by_text("Accuracy of the model")
    report.wait_for()
    assert report.evaluate("e => getComputedStyle(e).color") == "rgb(255, 0, 0)"
    assert opened.title() == "Report"  # its script did not run

    other_tab = context.new_page()
    other_tab.goto(server.url)
    other_tab.get_by_role("status").get_by_text("needs an API key").wait_for()
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violations(page, tmp_path, scheme):
    """Axe checks names, roles, contrast and headings by the rules of WCAG."""
    from axe_playwright_python.sync_playwright import Axe

    page.emulate_media(color_scheme=scheme)
    (tmp_path / "gray.png").write_bytes(encode_png(np.full((32, 32, 3), 9, np.uint8)))
    (tmp_path / "text.png").write_bytes(b"no image")
    page.set_input_files("#files", [tmp_path / "gray.png", tmp_path / "text.png"])
    page.locator("article").nth(1).wait_for()
    for summary in page.locator("article summary").all():
        summary.click()
    reports = [Axe().run(page)]
    page.goto("/docs")
    reports.append(Axe().run(page))
    assert not [report.generate_report() for report in reports if report.violations_count]
    assert "415" in pop_error(page)  # logged by the browser
