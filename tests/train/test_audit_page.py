"""Corrections on the audit's page in a real Chromium: opened as a file, and served."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from support import RANDOM_CONVNET
from support.sample_images import make_png, write_image_folder
from support.server import NO_TLS

HEADER = "path,action,label"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A leaked test image, a copy with another label and an odd name, and an unreadable file."""
    root = tmp_path_factory.mktemp("page") / "photos"
    write_image_folder(root / "train", 12)
    write_image_folder(root / "test", 4, first=100)
    write_image_folder(root / "val", 4, first=200)
    train = root / "train"
    (root / "test/red/leaked.png").write_bytes((train / "red/003.png").read_bytes())
    (train / "blue" / 'a "copy", <b>.png').write_bytes((train / "green/007.png").read_bytes())
    (train / "red/short.png").write_bytes(make_png(2, 50)[:300])
    return root


@pytest.fixture(scope="module")
def audited(commands, photos, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """The served page: its URL, a client, its command, report and file of corrections."""
    report = tmp_path_factory.mktemp("report")
    command = commands.start(
        *("audit", photos, "--out", report, "--data.size", 32, "--serve", "--port", 0),
        *RANDOM_CONVNET,
    )
    command.wait_for("stop it with Ctrl-C")
    (url,) = re.findall(r"http://127\.0\.0\.1:\d+/", command.text)
    with httpx.Client(base_url=url, verify=NO_TLS) as http:
        file = photos / "corrections.csv"
        yield SimpleNamespace(url=url, http=http, command=command, report=report, file=file)
    if command.poll() is None:
        command.kill()


@pytest.fixture
def open_page(browser) -> Iterator:
    """`open_page(url, width)`: a page. An error in its console or another host fails the test."""
    contexts = []
    errors: list[str] = []

    def open_url(url: str, width: int = 1280):
        context = browser.new_context(viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "request",
            lambda request: (
                request.url.startswith((url, "blob:", "data:")) or errors.append(request.url)
            ),
        )
        page.goto(url)
        page.locator("[aria-pressed]").first.wait_for()
        return page

    yield open_url
    for context in contexts:
        context.close()
    assert not errors


def item_of(page, path: str):
    """The first finding of an image."""
    return page.locator(f".item[data-path={json.dumps(path)}]").first


def read_rows(file: Path) -> list[str]:
    lines = file.read_text().splitlines()
    assert lines[0] == HEADER
    return lines[1:]


def wait_until_saved(page) -> None:
    page.get_by_role("status").get_by_text("Saved to corrections.csv").wait_for()


def test_a_served_page_saves_each_choice(audited, open_page):
    audited.file.write_text(f"{HEADER}\nred/other.png,keep,\ntest/red/leaked.png,keep,\n")
    page = open_page(audited.url)
    leaked = item_of(page, "test/red/leaked.png")
    assert leaked.get_by_role("button", name="Keep").get_attribute("aria-pressed") == "true"

    leaked.get_by_role("button", name="Leave out").click()
    copy = item_of(page, 'train/blue/a "copy", <b>.png')
    copy.get_by_role("button", name="Relabel").click()
    assert copy.get_by_label("New label").input_value() == "green"
    wait_until_saved(page)
    assert read_rows(audited.file) == [
        "red/other.png,keep,",
        "test/red/leaked.png,leave out,",
        '"train/blue/a ""copy"", <b>.png",relabel,green',
    ]

    copy.get_by_label("New label").select_option("red")
    leaked.get_by_role("button", name="Leave out").click()
    wait_until_saved(page)
    assert read_rows(audited.file) == [
        "red/other.png,keep,",
        '"train/blue/a ""copy"", <b>.png",relabel,red',
    ]
    assert "1 kept, 1 relabelled, 0 left out" in page.locator("#bar").inner_text()

    page.reload()
    copy = item_of(page, 'train/blue/a "copy", <b>.png')
    copy.get_by_label("New label").wait_for()
    assert copy.get_by_label("New label").input_value() == "red"


def test_the_keyboard_is_enough(audited, open_page):
    audited.file.unlink(missing_ok=True)
    page = open_page(audited.url)
    order = page.locator(".item").evaluate_all("items => items.map(item => item.dataset.path)")
    copy = 'train/blue/a "copy", <b>.png'
    assert order[:4] == ["train/red/short.png", "test/red/leaked.png", "train/red/003.png", copy]

    for key in ("ArrowRight", "l", "k", "ArrowRight", "r"):
        page.keyboard.press(key)
    wait_until_saved(page)
    decided = ["train/red/short.png,leave out,", "test/red/leaked.png,keep,"]
    assert read_rows(audited.file) == [*decided, '"train/blue/a ""copy"", <b>.png",relabel,green']

    page.keyboard.press("ArrowLeft")
    page.keyboard.press("u")
    wait_until_saved(page)
    assert read_rows(audited.file) == decided


def test_one_button_leaves_out_all_leaked_images(audited, open_page):
    audited.file.unlink(missing_ok=True)
    page = open_page(audited.url)
    page.locator("#leakage").get_by_role("button", name="Leave it out").click()
    wait_until_saved(page)
    assert read_rows(audited.file) == ["test/red/leaked.png,leave out,"]
    page.locator("#leakage").get_by_role("button", name="Undo").click()
    wait_until_saved(page)
    assert read_rows(audited.file) == []


def test_a_page_from_a_file_downloads_the_corrections(audited, open_page):
    page = open_page((audited.report / "index.html").as_uri())
    assert str(audited.file) in page.locator("#corrections").inner_text()
    item_of(page, "test/red/leaked.png").get_by_role("button", name="Leave out").click()
    copy = item_of(page, 'train/blue/a "copy", <b>.png')
    copy.get_by_role("button", name="Relabel").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download corrections.csv").click()
    assert download.value.suggested_filename == "corrections.csv"
    assert Path(download.value.path()).read_text().splitlines() == [
        HEADER,
        "test/red/leaked.png,leave out,",
        '"train/blue/a ""copy"", <b>.png",relabel,green',
    ]


def test_the_page_fits_a_phone_and_is_accessible(audited, open_page):
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(audited.url, width=390)
    item_of(page, "test/red/leaked.png").get_by_role("button", name="Leave out").click()
    wait_until_saved(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    violations = Axe().run(page).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in violations] == []


ONE = {"corrections": [{"path": "train/red/001.png", "action": "keep", "label": ""}]}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "192.0.2.1"}, 403),
        ({"Content-Type": "text/plain"}, 415),
    ],
)
def test_other_sites_can_save_nothing(audited, headers, status):
    audited.file.unlink(missing_ok=True)
    headers = {"Content-Type": "application/json"} | headers
    answer = audited.http.post("corrections", content=json.dumps(ONE), headers=headers)
    assert answer.status_code == status, answer.text
    assert audited.file.exists() == (status == 200)
    if "Host" in headers:
        assert audited.http.get("", headers=headers).status_code == 403


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not {"),
        (b"[]", "not {"),
        (b'{"corrections": [1]}', "not a list of objects"),
        (b'{"corrections": [{"path": "../etc/passwd", "action": "keep"}]}', "not an image of the"),
        (b'{"corrections": [{"path": "train/red/001.png", "action": "eat"}]}', "is not one of"),
        (
            b'{"corrections": [{"path": "train/red/001.png", "action": "relabel", "label": "x"}]}',
            "the classes are blue, green, red",
        ),
    ],
)
def test_wrong_corrections_are_refused(audited, content, message):
    audited.file.write_text(f"{HEADER}\ntrain/red/002.png,keep,\n")
    headers = {"Content-Type": "application/json"}
    answer = audited.http.post("corrections", content=content, headers=headers)
    assert answer.status_code == 400
    assert message in answer.json()["error"]
    assert read_rows(audited.file) == ["train/red/002.png,keep,"]


def test_a_file_that_is_broken_meanwhile_is_not_overwritten(audited):
    audited.file.write_text("nonsense")
    answer = audited.http.post("corrections", json=ONE)
    assert answer.status_code == 400
    assert "line 1: must name the columns" in answer.json()["error"]
    assert audited.file.read_text() == "nonsense"


def test_data_without_files_says_why_and_is_not_served(commands, tmp_path):
    command = commands.start("audit", "digits", "--out", tmp_path)
    assert command.status() == 0
    reason = "corrections are not supported for digits, whose images are not files"
    page = (tmp_path / "index.html").read_text()
    assert reason in page
    assert "data-path" not in page
    refused = commands.start("audit", "digits", "--serve")
    assert refused.status() == 2
    assert reason in refused.text.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--port", "1"), "--host and --port belong to --serve"),
        (("--serve", "--port", "x"), "--port x: not a number in 0..65535"),
        (("--serve", "--data.corrections", "/nowhere/c.csv"), "/nowhere: no such folder"),
    ],
)
def test_wrong_flags_are_refused(commands, photos, flags, message):
    command = commands.start("audit", photos, *flags, *RANDOM_CONVNET)
    assert command.status() == 2
    assert message in command.text.splitlines()[-1]


def test_a_port_in_use_is_refused(commands, audited, photos, tmp_path):
    audited.file.unlink(missing_ok=True)
    port = audited.url.rstrip("/").rpartition(":")[2]
    command = commands.start(
        *("audit", photos, "--out", tmp_path, "--data.size", 32, "--serve", "--port", port),
        *RANDOM_CONVNET,
    )
    assert command.status() == 2
    assert f"--port {port}: Address already in use; give another port" in command.text


def test_nothing_is_lost_when_the_server_is_killed(audited, open_page):
    """The last test of the file: it ends the server."""
    audited.file.unlink(missing_ok=True)
    page = open_page(audited.url)

    def save(i: int) -> int:
        entry = {"path": f"train/red/{i:03d}.png", "action": "keep"}
        return audited.http.post("corrections", json={"corrections": [entry]}).status_code

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(save, range(12))) == {200}
    audited.command.kill()
    audited.command.wait()
    assert len(read_rows(audited.file)) == 12

    item_of(page, "test/red/leaked.png").get_by_role("button", name="Leave out").click()
    page.get_by_role("status").get_by_text("Not saved: the server does not answer").wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download corrections.csv").click()
    assert "test/red/leaked.png,leave out," in Path(download.value.path()).read_text()
