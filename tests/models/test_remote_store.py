"""The store in a bucket: the same commands, many writers, and connections that break."""

import itertools
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from models.__main__ import main
from models.bundle import Bundle, BundleError
from models.store import BundleCache, Store, StoreError, object_storage
from support import tiny_bundle
from support.s3_server import S3Server, failing_s3_server

BUCKET = "bucket"
SAMPLES = 2
_numbers = itertools.count(1)
FILES = SAMPLES + 4  # samples, expected.npz, model.onnx, SHA256SUMS, manifest.json


@pytest.fixture(scope="module")
def running_server() -> Iterator[S3Server]:
    with failing_s3_server(BUCKET) as server:
        yield server


@pytest.fixture(autouse=True)
def s3(running_server: S3Server, tmp_path, monkeypatch) -> S3Server:
    """A server without failures, and an empty cache."""
    monkeypatch.setenv("IMAGO_STORE_CACHE", str(tmp_path / "cache"))
    running_server.choose_failure = lambda method, path: None
    running_server.requests.clear()
    return running_server


@pytest.fixture
def no_retries(monkeypatch) -> None:
    """Let each failure count: without it, obstore tries a request again."""
    monkeypatch.setitem(object_storage.RETRIES, "max_retries", 0)


@pytest.fixture
def prefix() -> str:
    """A prefix of the bucket that no other test uses."""
    return f"store-{next(_numbers)}"


@pytest.fixture
def url(prefix) -> str:
    return f"s3://{BUCKET}/{prefix}"


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A local store with colours/1 and colours/2."""
    tiny_bundle.publish(tmp_path / "local", samples=SAMPLES)
    tiny_bundle.publish(tmp_path / "local", samples=SAMPLES)
    return tmp_path / "local"


def publish(url: str) -> Path:
    return tiny_bundle.publish(url, samples=SAMPLES)


def run(store: Path | str, *arguments: str) -> int:
    return main([*arguments, "--store", str(store)])


def fail_from(count: int, failure: str) -> Callable[[str, str], str | None]:
    """Fail each upload but the first `count`."""
    uploads = iter(range(10_000))

    def choose(method: str, path: str) -> str | None:
        return failure if method == "PUT" and next(uploads) >= count else None

    return choose


def fail_once(words: str, failure: str, method: str = "PUT") -> Callable[[str, str], str | None]:
    """Fail the first request of this method whose path ends with `words`."""
    failures = [failure]

    def choose(sent_method: str, path: str) -> str | None:
        is_meant = sent_method == method and path.endswith(words)
        return failures.pop() if failures and is_meant else None

    return choose


# Commands


def test_the_commands_work_on_a_bucket_as_on_a_directory(url, s3, prefix, capsys):
    for _ in range(4):
        publish(url)
    assert run(url, "list") == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[:2] for line in lines] == [["colours", str(n)] for n in (1, 2, 3, 4)]
    assert [line.endswith("latest") for line in lines] == [False, False, False, True]

    assert run(url, "show", "colours", "2") == 0
    assert "colours/2  tiny, 3 classes" in capsys.readouterr().out
    assert run(url, "verify", "colours", "3") == 0
    assert "ok: colours/3" in capsys.readouterr().out

    assert run(url, "rollback", "colours") == 0
    assert Store(url).latest("colours") == 3
    assert run(url, "promote", "colours", "4") == 0
    assert s3.read(BUCKET, f"{prefix}/colours/latest") == b"4\n"
    assert run(url, "prune", "colours", "--keep", "1") == 0
    assert "deleted 1, 2" in capsys.readouterr().out
    assert Store(url).versions("colours") == [3, 4]
    assert publish(url).name == "5"


@pytest.mark.parametrize("kind", ["s3", "file", "directory"])
def test_push_and_pull(kind, local, tmp_path, url, capsys):
    other = {"s3": url, "file": f"file://{tmp_path}/far%20off", "directory": tmp_path / "far"}[kind]
    other = str(other)
    last = tmp_path / "last"
    assert run(local, "push", "colours", "1", other) == 0
    assert run(local, "push", "colours", other) == 0
    capsys.readouterr()
    assert run(local, "push", "colours", other) == 0
    assert "already at" in capsys.readouterr().out
    assert run(last, "pull", "colours", other) == 0
    assert Store(last).versions("colours") == [2]
    assert Store(last).latest("colours") == 2
    assert run(last, "pull", "colours", "1", other) == 0
    assert Store(last).latest("colours") == 2
    assert Bundle(last / "colours" / "1").digest == Bundle(local / "colours" / "1").digest
    capsys.readouterr()
    assert run(last, "pull", "colours", other) == 0
    assert "already at" in capsys.readouterr().out


def test_push_moves_latest_forward_only(local, url):
    assert run(local, "push", "colours", "1", url) == 0
    assert run(local, "push", "colours", "2", url, "--no-promote") == 0
    assert Store(url).latest("colours") == 1
    assert run(local, "push", "colours", "2", url) == 0
    assert run(local, "push", "colours", "1", url) == 0
    assert Store(url).latest("colours") == 2


def test_latest_of_a_bucket_can_be_a_copy_of_the_version(local, url, prefix, s3):
    """As `aws s3 sync` leaves it, which follows links."""
    for path in local.rglob("*"):
        if path.is_file():
            s3.write(BUCKET, f"{prefix}/{path.relative_to(local)}", path.read_bytes())
    for path in (local / "colours" / "2").iterdir():
        if path.is_file():
            s3.write(BUCKET, f"{prefix}/colours/latest/{path.name}", path.read_bytes())
    assert Store(url).latest("colours") == 2
    assert run(url, "promote", "colours", "1") == 0
    assert Store(url).latest("colours") == 1
    assert publish(url).name == "3"
    assert Store(url).latest("colours") == 3


def test_another_bundle_under_the_same_version_is_refused(local, tmp_path, url, capsys):
    assert run(local, "push", "colours", "1", url) == 0
    other = tmp_path / "other"
    tiny_bundle.publish(other, scale=2, samples=SAMPLES)
    assert run(other, "push", "colours", url) == 2
    assert f"{url}/colours/1: exists already with other contents" in capsys.readouterr().err
    assert run(other, "pull", "colours", url) == 2
    assert "colours/1: exists already with other contents" in capsys.readouterr().err


def test_a_broken_bundle_is_not_pushed(local, url, prefix, s3, capsys):
    (local / "colours" / "2" / "model.onnx").write_bytes(b"torn")
    assert run(local, "push", "colours", url) == 2
    assert "model.onnx: changed since" in capsys.readouterr().err
    assert s3.keys(BUCKET, prefix) == []


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("samples/00.png", b"torn", "samples/00.png: changed since it was written"),
        ("samples/00.png", None, "samples/00.png: listed in SHA256SUMS, but missing, so the"),
        ("SHA256SUMS", None, "SHA256SUMS: no such object, so the version is half-written; push it"),
        ("SHA256SUMS", f"{'0' * 64}  ../../evil\n".encode(), "'../../evil' points outside"),
        ("manifest.json", None, "latest of colours names version 2, which is half-written"),
    ],
)
def test_a_version_that_is_not_whole_is_not_pulled(
    local, tmp_path, url, prefix, s3, capsys, monkeypatch, file, content, message
):
    for version in ("1", "2"):
        assert run(local, "push", "colours", version, url) == 0
    key = f"{prefix}/colours/2/{file}"
    if content is None:
        s3.client.delete_object(Bucket=BUCKET, Key=key)
    else:
        s3.write(BUCKET, key, content)
    monkeypatch.setenv("IMAGO_STORE_CACHE", str(tmp_path / "other-machine"))
    assert run(tmp_path / "other", "pull", "colours", "2", url) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert Store(tmp_path / "other").versions("colours") == []
    assert not list(tmp_path.rglob("evil"))


# Writers at the same time


def publish_versions(url: str, count: int) -> list[int]:
    return [int(publish(url).name) for _ in range(count)]


def test_processes_that_publish_at_the_same_time_get_different_versions(url, prefix, s3):
    """Each tenth request is refused at first, as a busy store does."""
    count = iter(range(1, 1_000_000))
    s3.choose_failure = lambda method, path: "unavailable" if next(count) % 10 == 0 else None
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(3, mp_context=context) as pool:
        jobs = [pool.submit(publish_versions, url, 3) for _ in range(3)]
        versions = [version for job in jobs for version in job.result()]
    s3.choose_failure = lambda method, path: None

    assert sorted(versions) == list(range(1, 10))
    store = Store(url)
    assert store.versions("colours") == list(range(1, 10))
    assert store.latest("colours") == 9
    for version in versions:
        assert store.open("colours", version).manifest.version == version
    assert not [key for key in s3.keys(BUCKET, prefix) if ".staging" in key]


def test_a_late_writer_does_not_move_latest_back(url):
    store = Store(url)
    with store.stage("colours") as slow:
        assert publish(url).name == "2"
        write_as(slow.path, url, 1)
        slow.publish()
    assert store.versions("colours") == [1, 2]
    assert store.latest("colours") == 2


def write_as(target: Path, url: str, version: int) -> None:
    """Write the bundle of colours/2 with another version to `target`."""
    shutil.copytree(Store(url).path("colours", 2), target, dirs_exist_ok=True)
    tiny_bundle.edit_manifest(target, version=version)
    tiny_bundle.update_checksums(target)


def test_latest_moves_by_compare_and_set(url, prefix, s3):
    """Another writer moves it between this writer's read and write."""
    for _ in range(3):
        publish(url)
    store = Store(url)
    assert run(url, "promote", "colours", "1") == 0
    s3.requests.clear()

    def choose(method: str, path: str) -> None:
        if method == "PUT" and path.endswith("/latest"):
            s3.choose_failure = lambda method, path: None
            backend_write(s3, f"{prefix}/colours/latest", b"3\n")

    s3.choose_failure = choose
    store.advance("colours", 2)
    assert Store(url).latest("colours") == 3


def backend_write(s3: S3Server, key: str, content: bytes) -> None:
    """Write an object without a request: one is under way."""
    from moto.s3.models import s3_backends

    (accounts,) = s3_backends.values()
    accounts["aws"].put_object(BUCKET, key, content)


def test_a_job_whose_claim_is_taken_publishes_nothing(url, prefix, s3):
    publish(url)
    store = Store(url)
    with store.stage("colours") as staged:
        shutil.copytree(store.path("colours", 1), staged.path, dirs_exist_ok=True)
        tiny_bundle.edit_manifest(staged.path, version=2)
        tiny_bundle.update_checksums(staged.path)
        s3.write(BUCKET, f"{prefix}/colours/.staging-2", b"of another job")
        with pytest.raises(BundleError, match="colours/2: another job writes this version"):
            staged.publish()
    assert store.versions("colours") == [1]


def test_a_copied_version_that_is_being_written_is_refused(local, url, prefix, s3, capsys):
    s3.write(BUCKET, f"{prefix}/colours/.staging-2", b"of another job")
    assert run(local, "push", "colours", url) == 2
    assert f"{url}/colours/2: exists already, or another job is writing" in capsys.readouterr().err
    assert publish(url).name == "3"


# Connections that break


@pytest.mark.parametrize("failure", ["reset", "lost"])
def test_a_push_that_is_cut_at_any_file_is_invisible_and_can_be_repeated(
    local, tmp_path, url, prefix, s3, capsys, no_retries, failure
):
    claim_and_files = FILES + 1
    for count in range(claim_and_files):
        s3.choose_failure = fail_from(count, failure)
        status = run(local, "push", "colours", url)
        s3.choose_failure = lambda method, path: None
        error = capsys.readouterr().err
        if failure == "lost" and count >= FILES:
            assert status == 0  # the manifest and `latest` are read where their answer is lost
            return
        assert status == 2, count
        assert error.startswith(f"error: {url}: can't be reached: ")
        assert error.count("\n") == 1
        assert Store(url).names() == []
        assert run(tmp_path / "other", "pull", "colours", "2", url) == 2
        capsys.readouterr()
        # As after a crash, in which nothing is cleaned up.
        for key in s3.keys(BUCKET, prefix):
            assert not key.endswith("manifest.json")
            s3.client.delete_object(Bucket=BUCKET, Key=key)
    assert run(local, "push", "colours", url) == 0
    assert Store(url).latest("colours") == 2
    assert run(tmp_path / "other", "pull", "colours", url) == 0


@pytest.mark.parametrize("failure", ["unavailable", "reset", "lost"])
@pytest.mark.parametrize("file", [".staging-1", "model.onnx", "manifest.json", "latest"])
def test_one_failure_of_a_request_does_no_harm(url, prefix, s3, file, failure):
    s3.choose_failure = fail_once(file, failure)
    publish(url)
    assert Store(url).versions("colours") == [1]
    assert Store(url).open("colours").manifest.version == 1
    assert not [key for key in s3.keys(BUCKET, prefix) if ".staging" in key]


def test_damage_in_transfer_is_noticed(local, url, s3, capsys):
    s3.choose_failure = fail_once("model.onnx", "damaged")
    assert run(local, "push", "colours", url) == 2
    assert "model.onnx: arrived damaged (sha256 differs)" in capsys.readouterr().err
    assert Store(url).names() == []


@pytest.mark.parametrize("failure", ["cut", "reset", "unavailable"])
def test_a_read_that_breaks_off_is_repeated(local, tmp_path, url, s3, monkeypatch, failure):
    assert run(local, "push", "colours", url) == 0
    monkeypatch.setenv("IMAGO_STORE_CACHE", str(tmp_path / "other-machine"))
    s3.choose_failure = fail_once("model.onnx", failure, "GET")
    assert run(tmp_path / "other", "pull", "colours", url) == 0


def test_a_read_that_stalls_is_repeated(local, tmp_path, url, s3, monkeypatch):
    monkeypatch.setitem(object_storage.TIMEOUTS, "read_timeout", "500ms")
    assert run(local, "push", "colours", url) == 0
    monkeypatch.setenv("IMAGO_STORE_CACHE", str(tmp_path / "other-machine"))
    s3.choose_failure = fail_once("model.onnx", "stalled", "GET")
    assert run(tmp_path / "other", "pull", "colours", url) == 0
    s3.release_stalled.set()


def test_an_interrupted_pull_is_invisible_and_can_be_repeated(
    local, tmp_path, url, s3, capsys, monkeypatch, no_retries
):
    assert run(local, "push", "colours", url) == 0
    monkeypatch.setenv("IMAGO_STORE_CACHE", str(tmp_path / "other-machine"))
    other = tmp_path / "other"
    for file in ("SHA256SUMS", "model.onnx", "samples/expected.npz", "manifest.json"):
        s3.choose_failure = lambda method, path, file=file: "cut" if path.endswith(file) else None
        assert run(other, "pull", "colours", url) == 2
        assert "can't be reached" in capsys.readouterr().err
        assert [path for path in other.rglob("*") if path.is_file()] == []
    s3.choose_failure = lambda method, path: None
    assert run(other, "pull", "colours", url) == 0


def test_prune_removes_what_interrupted_uploads_left(url, prefix, s3):
    publish(url)
    for version in (2, 3):
        s3.write(BUCKET, f"{prefix}/colours/.staging-{version}", b"of a job that died")
        s3.write(BUCKET, f"{prefix}/colours/{version}/model.onnx", b"half")
    s3.write(BUCKET, f"{prefix}/colours/.staging-1", b"of a job that died after its manifest")
    for key in s3.keys(BUCKET, f"{prefix}/colours/"):
        if "3" not in key.partition("/colours/")[2]:
            make_old(key)

    assert Store(url).versions("colours") == [1]
    assert run(url, "prune", "colours") == 0
    left = s3.keys(BUCKET, prefix)
    gone = ("/colours/2/", "/.staging-1", "/.staging-2")
    assert not [key for key in left if any(words in key for words in gone)]
    # Version 3 may still be written.
    assert f"{prefix}/colours/.staging-3" in left
    assert f"{prefix}/colours/3/model.onnx" in left
    assert Store(url).open("colours", 1)
    assert publish(url).name == "4"


def make_old(key: str) -> None:
    """Let an object be two days old."""
    from moto.s3.models import s3_backends

    (accounts,) = s3_backends.values()
    accounts["aws"].buckets[BUCKET].keys[key].last_modified = datetime.now(UTC) - timedelta(days=2)


# What the user can correct


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("denied", "access denied; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("skewed", "the clock of this machine is off"),
    ],
)
@pytest.mark.parametrize("command", [["list"], ["show", "colours"], ["pull", "colours", "URL"]])
def test_a_store_that_refuses_says_why(url, s3, tmp_path, capsys, failure, message, command):
    publish(url)
    s3.choose_failure = lambda method, path: failure
    arguments = [url if argument == "URL" else argument for argument in command]
    assert run(tmp_path / "other" if "URL" in command else url, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {url}: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ("s3://not-there/store", "s3://not-there/store: no such bucket; check the name"),
        ("s3://", "s3://: no bucket; write s3://bucket/path"),
        ("nowhere://bucket/x", "give a directory, or a URL that begins with s3://, gs://, az://"),
        ("file://host/path", "file://host/path: names another machine; write file:///path"),
    ],
)
@pytest.mark.parametrize("command", ["show", "push"])
def test_a_store_that_is_not_there_is_one_line(local, capsys, store, message, command):
    arguments = (
        (local, "push", "colours", store) if command == "push" else (store, "show", "colours")
    )
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_bucket_that_is_out_of_reach_is_one_line(monkeypatch, capsys, no_retries):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert run("s3://bucket/store", "list") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: s3://bucket/store: can't be reached: ")
    assert error.count("\n") == 1


def test_check_writable_finds_a_store_that_can_only_be_read(url, prefix, s3):
    store = Store(url)
    store.check_writable("colours")
    assert s3.keys(BUCKET, prefix) == []
    s3.choose_failure = lambda method, path: "denied" if method == "PUT" else None
    with pytest.raises(StoreError, match="access denied"):
        store.check_writable("colours")


# The cache


def test_latest_is_one_small_request(url, s3):
    publish(url)
    store = Store(url)
    assert store.latest("colours") == 1
    s3.requests.clear()
    assert store.latest("colours") == 1
    assert [method for method, _ in s3.requests] == ["GET"]


def test_a_version_is_copied_once(url, s3, tmp_path, monkeypatch):
    publish(url)
    monkeypatch.setenv("IMAGO_STORE_CACHE", str(tmp_path / "fresh"))
    path = Store(url).path("colours", 1)
    assert path.is_relative_to(tmp_path / "fresh")
    s3.requests.clear()
    assert Store(url).path("colours", 1) == path
    assert not [name for _, name in s3.requests if "model.onnx" in name]


def test_a_damaged_copy_is_replaced(url):
    copy = publish(url)
    digest = Bundle(copy).digest
    (copy / "model.onnx").write_bytes(b"damaged on this disk")
    assert Store(url).open("colours", 1).digest == digest


def test_a_version_that_was_made_again_replaces_its_copy(url, prefix, s3, tmp_path, monkeypatch):
    copy = publish(url)
    old = Bundle(copy).digest
    for key in s3.keys(BUCKET, prefix):
        s3.client.delete_object(Bucket=BUCKET, Key=key)
    other = tmp_path / "local"
    tiny_bundle.publish(other, scale=2, samples=SAMPLES)
    monkeypatch.setenv("IMAGO_STORE_CACHE", str(tmp_path / "other-machine"))
    assert run(other, "push", "colours", url) == 0
    monkeypatch.setenv("IMAGO_STORE_CACHE", str(tmp_path / "cache"))
    assert Store(url).open("colours", 1).digest != old


def test_the_cache_is_bounded_but_keeps_the_two_last_used_versions(url, tmp_path):
    for _ in range(4):
        publish(url)
    cache = BundleCache(url, tmp_path / "bounded", max_bytes=1)
    store = Store(url, cache)
    for version in (1, 2, 3, 4):
        store.path("colours", version)
    kept = sorted(path.name for path in (cache.root / "colours").iterdir() if path.is_dir())
    assert kept == ["3", "4"]


def test_a_cache_that_can_not_be_written_is_one_line(url, tmp_path, monkeypatch, capsys):
    publish(url)
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("IMAGO_STORE_CACHE", str(blocked))
    assert run(url, "verify", "colours") == 1
    error = capsys.readouterr().err
    assert f"copies of {url} can't be kept there" in error
    assert "IMAGO_STORE_CACHE" in error
    assert error.count("\n") == 1
