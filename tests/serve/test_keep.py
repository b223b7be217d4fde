"""`--keep`: a sample of the images is stored with what was answered, without delaying answers."""

import contextlib
import hashlib
import os
import resource
import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cv2
import numpy as np
import pytest

from models.bundle import Calibration
from models.kept import LabelledImage, Reason, open_kept
from models.kept.records import now
from models.kept.similarity import REMEMBERED_IMAGES, NearDuplicates
from serve.wire import Job
from serve.worker import keeper
from serve.worker.keeper import RecentImages
from serve.worker.kept_writer import AnsweredBatch, Candidate, CpuBudget
from support import tiny_bundle
from support.s3_server import s3_server
from support.server import SHADOW_SECONDS, Server, assert_refused, wait_until

DOUBTFUL = Calibration(abstain_threshold=0.9, energy_threshold=-3.0)


def make_gray(value: int = 128, kind: str = ".png") -> bytes:
    """An image on which the model of `doubtful_store` abstains; dark ones are also unusual."""
    return cv2.imencode(kind, np.full((32, 32, 3), value, np.uint8))[1].tobytes()


def make_gradient() -> bytes:
    """Another image on which the model abstains."""
    columns = np.linspace(255, 0, 32).astype(np.uint8)
    return cv2.imencode(".png", np.tile(columns[None, :, None], (32, 1, 3)))[1].tobytes()


@pytest.fixture(scope="module")
def doubtful_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("doubtful")
    tiny_bundle.publish(store, calibration=DOUBTFUL)
    return store


@pytest.fixture
def start_keeping(start, doubtful_store, tmp_path) -> Callable[..., Server]:
    """Start a server that keeps images in `tmp_path / "kept"`, none at random."""

    def start_server(*flags: str, **options: object) -> Server:
        keep = ("--keep", str(tmp_path / "kept"), "--keep-share", "0", "--keep-free-bytes", "1")
        return start(*keep, *flags, **{"store": doubtful_store, **options})

    return start_server


def read_kept(tmp_path: Path) -> list[LabelledImage]:
    return open_kept(tmp_path / "kept").read()


def wait_for_kept(tmp_path: Path, count: int, seconds: float = 240) -> list[LabelledImage]:
    wait_until(lambda: len(read_kept(tmp_path)) >= count, seconds)
    entries = read_kept(tmp_path)
    assert len(entries) == count
    return entries


def test_nothing_is_kept_by_default(server):
    server.predict(make_gray())
    assert server.metric("imago_kept_total", reason="random") == 0
    assert server.http.get("/model").json()["keeps_images"] is False


def test_doubtful_images_are_kept_with_their_answers(start_keeping, tmp_path):
    server = start_keeping()
    assert server.http.get("/model").json()["keeps_images"] is True
    gray = make_gray()
    answer = server.predict(gray).json()
    server.predict(tiny_bundle.make_image("red"))  # neither doubtful nor drawn

    (entry,) = wait_for_kept(tmp_path, 1)
    image = entry.image
    prediction = answer["predictions"][0]
    assert prediction["abstain"]
    assert image.digest == hashlib.sha256(gray).hexdigest()
    assert (tmp_path / "kept" / image.file).read_bytes() == gray
    assert image.request_id == answer["id"]
    assert image.model.name == "colours"
    assert str(image.model.version) == answer["model"]["version"]
    assert image.top[0].label == prediction["label"]
    assert image.top[0].confidence == pytest.approx(prediction["confidence"], rel=1e-5)
    assert image.energy == pytest.approx(prediction["energy"], rel=1e-5)
    assert (image.width, image.height) == (32, 32)
    assert image.read_embedding() == pytest.approx(np.full(3, 128 / 255), abs=1e-3)
    assert abs(datetime.now(UTC) - image.time) < timedelta(minutes=10)
    assert set(image.reasons) <= {Reason.ABSTAIN, Reason.OUT_OF_DISTRIBUTION}
    # A file is counted after it is written.
    wait_until(lambda: server.metric("imago_kept_bytes") == len(gray))
    wait_until(lambda: server.metric("imago_kept_total", reason="abstain") == 1)


def test_images_are_kept_for_each_reason(start_keeping, tmp_path):
    """Unusual, corrected by a client, and drawn at random, each with its probability."""
    server = start_keeping("--keep-share", "1")
    server.predict(make_gray(0))
    blue = server.predict(tiny_bundle.make_image("blue")).json()["id"]
    server.http.post("/feedback", json={"id": blue, "label": "green"})
    many = [("f", ("a", tiny_bundle.make_image("red", seed=seed))) for seed in (1, 2)]
    server.http.post("/predict", files=many)

    wait_until(lambda: server.metric("imago_kept_total", reason="corrected") == 1)
    unusual, corrected, *others = wait_for_kept(tmp_path, 4)
    assert Reason.OUT_OF_DISTRIBUTION in unusual.image.reasons
    assert unusual.image.probability == 1
    assert Reason.CORRECTED in corrected.image.reasons
    assert corrected.label.label == "green"
    assert corrected.label.who == "feedback"
    assert [entry.image.image for entry in others] == [0, 1]
    assert all(entry.image.weight == 1 for entry in others)


def test_images_on_which_the_shadow_version_disagrees_are_kept(start, tmp_path):
    store = tmp_path / "store"
    tiny_bundle.publish(store)
    tiny_bundle.publish(store, classes=["red", "green", "purple"], promote=False)
    shadow = ("--shadow-version", "2", "--shadow-share", "1", "--version", "1")
    keep = ("--keep", str(tmp_path / "kept"), "--keep-share", "0", "--keep-free-bytes", "1")
    server = start(*shadow, *keep, store=store)
    wait_until(lambda: "shadow ready" in server.log.read_text(), SHADOW_SECONDS)
    request_id = server.predict(tiny_bundle.make_image("blue")).json()["id"]
    (entry,) = wait_for_kept(tmp_path, 1, SHADOW_SECONDS)
    assert entry.image.reasons == [Reason.SHADOW]
    assert entry.image.request_id == request_id


def test_duplicates_are_kept_once_and_near_ones_not(start_keeping, tmp_path):
    server = start_keeping()
    first = server.predict(make_gray()).json()["id"]
    second = server.predict(make_gray()).json()["id"]
    server.predict(make_gray(129))  # nearly the same
    wait_until(lambda: server.metric("imago_kept_dropped_total", reason="duplicate") == 2)
    (entry,) = wait_for_kept(tmp_path, 1)
    assert entry.image.request_ids == {first, second}
    assert server.metric("imago_kept_total", reason="abstain") == 1


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [
        ("--keep-files", "1", "limit"),
        ("--keep-bytes", "10", "limit"),
        ("--keep-free-bytes", str(1 << 60), "disk"),
    ],
)
def test_what_is_kept_is_bounded(start_keeping, tmp_path, flag, value, reason):
    server = start_keeping("--keep-share", "1", flag, value)
    for seed in range(4):
        assert server.predict(tiny_bundle.make_image("red", seed=seed)).status_code == 200
    expected = 1 if flag == "--keep-files" else 0
    wait_until(lambda: server.metric("imago_kept_dropped_total", reason=reason) == 4 - expected)
    assert len(read_kept(tmp_path)) == expected


def test_old_images_are_deleted(start_keeping, tmp_path):
    day = (datetime.now(UTC) - timedelta(days=8)).date().isoformat()
    old = tmp_path / "kept" / day / f"{'0' * 64}.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    left = tmp_path / "kept" / "2020-01-01" / ".staging-of-a-killed-process"
    left.parent.mkdir()
    left.write_bytes(b"half an image")
    os.utime(left, (0, 0))
    server = start_keeping("--keep-days", "7")
    server.predict(make_gray())
    wait_for_kept(tmp_path, 1)
    assert not old.exists()
    assert not left.exists()


def test_a_killed_service_loses_nothing_that_was_written(start_keeping, tmp_path):
    """All processes are killed while images are written; a new service continues."""
    server = start_keeping("--keep-share", "1")
    for seed in range(40):
        server.predict(tiny_bundle.make_image("red", seed=seed))
        if seed == 20:
            wait_until(lambda: len(read_kept(tmp_path)) > 2)
    written = {entry.image.digest for entry in read_kept(tmp_path)}
    for pid in (*server.children(), server.process.pid):
        with contextlib.suppress(ProcessLookupError):  # it has ended with one before it
            os.kill(pid, signal.SIGKILL)
    server.process.wait()

    entries = read_kept(tmp_path)
    assert written <= {entry.image.digest for entry in entries}
    for entry in entries:
        content = (tmp_path / "kept" / entry.image.file).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry.image.digest

    restarted = start_keeping("--keep-share", "1")
    restarted.predict(tiny_bundle.make_image("green"))
    wait_for_kept(tmp_path, len(entries) + 1)


def test_images_that_wait_are_written_before_the_service_ends(start_keeping, tmp_path):
    server = start_keeping("--keep-share", "1")
    for seed in range(10):
        server.predict(tiny_bundle.make_image("red", seed=seed))
    assert server.stop() == 0
    assert len(read_kept(tmp_path)) == 10


def test_answers_do_not_wait_for_a_directory_that_cannot_be_written(start_keeping, tmp_path):
    (tmp_path / "kept").write_text("a file")
    server = start_keeping()
    for value in range(100, 180):
        assert server.predict(make_gray(value)).status_code == 200
    wait_until(lambda: server.metric("imago_kept_dropped_total", reason="queue") > 0)
    assert "images are not kept" in server.log.read_text()
    # Doubtful images leave room for others in the queue.
    blue = server.predict(tiny_bundle.make_image("blue")).json()["id"]
    server.http.post("/feedback", json={"id": blue, "label": "green"})

    (tmp_path / "kept").unlink()
    wait_until(lambda: (tmp_path / "kept").is_dir() and read_kept(tmp_path))
    wait_until(lambda: server.metric("imago_kept_total", reason="corrected") == 1)


def test_metadata_is_taken_out(start_keeping, tmp_path):
    server = start_keeping()
    jpeg = make_gray(128, ".jpg")
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0" + b"HOME"
    tagged = jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]
    server.predict(tagged)
    (entry,) = wait_for_kept(tmp_path, 1)
    stored = (tmp_path / "kept" / entry.image.file).read_bytes()
    assert b"HOME" not in stored
    assert b"Exif" in stored  # with the orientation only


def test_metadata_stays_where_it_is_wanted(start_keeping, tmp_path):
    server = start_keeping("--keep-strip-exif", "false")
    jpeg = make_gray(128, ".jpg")
    comment = b"HOME"
    tagged = jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]
    server.predict(tagged)
    (entry,) = wait_for_kept(tmp_path, 1)
    assert (tmp_path / "kept" / entry.image.file).read_bytes() == tagged


def test_images_are_deleted_by_request_id(start_keeping, tmp_path):
    server = start_keeping("--api-key", "secret")
    key = {"X-API-Key": "secret"}
    request_id = server.predict(make_gray(), **key).json()["id"]
    wait_for_kept(tmp_path, 1)

    path = f"/kept/{request_id}"
    assert server.http.delete(path).status_code == 401
    assert server.http.delete(path, headers=key).json() == {"deleted": 1}
    assert read_kept(tmp_path) == []
    assert server.http.delete(path, headers=key).status_code == 404

    # What a worker still has in memory is forgotten as well.
    server.http.post("/feedback", json={"id": request_id, "label": "green"}, headers=key)
    other = server.predict(make_gradient(), **key).json()["id"]
    (entry,) = wait_for_kept(tmp_path, 1)
    assert entry.image.request_id == other


def test_deletion_needs_the_api_key_of_the_service(start_keeping):
    server = start_keeping()
    response = server.http.delete("/kept/some-id")
    assert response.status_code == 403
    assert "--api-key" in response.json()["detail"]


def test_the_command_shows_and_deletes(run_serve, start_keeping, tmp_path):
    server = start_keeping()
    request_id = server.predict(make_gray()).json()["id"]
    wait_for_kept(tmp_path, 1)
    kept = str(tmp_path / "kept")

    shown = run_serve("kept", kept)
    assert shown.returncode == 0
    assert "1 image" in shown.stdout
    assert "abstain" in shown.stdout
    assert run_serve("kept", kept, "--delete", request_id).returncode == 0
    assert read_kept(tmp_path) == []
    assert_refused(run_serve("kept", kept, "--delete", request_id), "no image", request_id)


def test_locations_that_cannot_be_used_are_refused(run_serve, doubtful_store):
    result = run_serve("--store", str(doubtful_store), "--keep", "ftp://host/kept")
    assert_refused(result, "--keep", "s3://bucket/path")


def test_a_bucket_that_is_away_is_told_in_one_line(run_serve):
    env = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
    }
    assert_refused(run_serve("kept", "s3://kept/colours", **env), "s3://kept/colours")


def test_images_are_kept_in_a_bucket(start, doubtful_store):
    with s3_server("kept"):
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
        env = {name: os.environ[name] for name in (*names, "AWS_ENDPOINT_URL")}
        keep = ("--keep", "s3://kept/colours", "--keep-share", "0")
        server = start(*keep, store=doubtful_store, env=env)
        gray = make_gray()
        server.predict(gray)
        wait_until(lambda: server.metric("imago_kept_total", reason="abstain") == 1)
        folder = open_kept("s3://kept/colours")
        (entry,) = folder.read()
        assert folder.read_file(entry.image) == gray


def test_a_full_disk_leaves_whole_files(start_keeping, tmp_path):
    """The limit on the size of a file stands for a disk that is full within a line."""
    server = start_keeping("--keep-share", "1")
    (worker,) = server.workers()
    _, hard_limit = resource.prlimit(worker, resource.RLIMIT_FSIZE)
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (5000, hard_limit))
    for seed in range(20):
        assert server.predict(tiny_bundle.make_image("red", seed=seed)).status_code == 200
    wait_until(lambda: server.metric("imago_kept_dropped_total", reason="error") > 0)
    (lines,) = (tmp_path / "kept").glob("*/*.jsonl")
    assert lines.read_bytes().endswith(b"\n")
    assert 0 < len(read_kept(tmp_path)) < 20

    resource.prlimit(worker, resource.RLIMIT_FSIZE, (hard_limit, hard_limit))
    wait_for_kept(tmp_path, 20)


def test_the_writer_uses_a_share_of_a_core_apart_from_bursts():
    budget = CpuBudget(share=0.01, burst_seconds=0.2, now=0.0)
    assert budget.spend(0.1, now=1.0) == 0
    assert budget.spend(0.1, now=1.0) == 0
    time = 1.0
    used = 0.0
    for _ in range(100):
        rest = budget.spend(0.05, now=time)
        used += 0.05
        time += rest
    assert used / (time - 1.0) == pytest.approx(0.01)

    # A day without images does not save up for more than a burst.
    time += 86400
    assert budget.spend(0.2, now=time) == 0
    assert budget.spend(0.001, now=time) == pytest.approx(0.1)


def make_candidate(name: bytes, body: bytes = b"image") -> Candidate:
    job = Job(id=1, deadline=0.0, top_k=1, flags=0, body=body, name=name)
    answered = AnsweredBatch(None, now(), np.ones((1, 1)), np.zeros(1), None)
    return Candidate(job, answered, row=0)


def test_the_last_images_are_remembered_within_bounds(monkeypatch):
    monkeypatch.setattr(keeper, "RECENT_IMAGES", 10)
    monkeypatch.setattr(keeper, "RECENT_BYTES", 100)
    recent = RecentImages()
    for i in range(100):
        recent.add([make_candidate(b"%d" % i)], extra_bytes=1)
    assert recent.get(b"79") is None
    assert all(recent.get(b"%d" % i) for i in range(90, 100))

    recent.add([make_candidate(b"large", bytes(101))], extra_bytes=0)
    assert recent.get(b"large") is None
    for i in range(4):
        recent.add([make_candidate(b"half %d" % i, bytes(50))], extra_bytes=0)
    assert recent.get(b"99") is None
    assert recent.get(b"half 3")


def test_all_images_of_a_request_are_forgotten():
    recent = RecentImages()
    candidates = [make_candidate(name) for name in (b"a", b"a 1", b"ab")]
    recent.add(candidates, extra_bytes=0)
    recent.forget(b"a")
    assert [candidate.is_forgotten for candidate in candidates] == [True, True, False]
    assert recent.get(b"a 1") is None
    assert recent.get(b"ab") is candidates[2]


def test_near_duplicates_of_the_last_images_are_found():
    seen = NearDuplicates()
    one = np.array([1.0, 0.0])
    other = np.array([0.0, 1.0])
    assert not seen.has_near(1 << 63, one)
    for i in range(REMEMBERED_IMAGES):
        seen.add((1 << 63) + (i << 8), one)
    assert seen.has_near((1 << 63) + 3, one)  # two bits differ
    assert not seen.has_near((1 << 63) + 7, one)
    assert not seen.has_near(1 << 63, other)
    seen.add(0b1111 << 20, other)  # in place of the oldest
    assert seen.has_near(0b1111 << 20, other)
