"""The store in Azure's blob storage, spoken to by Azurite, the emulator of Microsoft.

Azurite is an npm package. The tests run where its command `azurite-blob` is on PATH.
"""

import base64
import hashlib
import hmac
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from models.bundle import BundleError
from models.store import Store, StoreError
from models.store.bucket_client import BucketClient
from support import tiny_bundle
from support.server import find_free_ports, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("azurite-blob"), reason="azurite-blob is not installed"),
]
# The account that Azurite documents, for tests only.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
API_VERSION = "2021-08-06"
CONTAINER = "container"


def create_container(endpoint: str) -> None:
    """Create the container, signed with the shared key."""
    date = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    headers = f"x-ms-date:{date}\nx-ms-version:{API_VERSION}\n"
    resource = f"/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
    text = "PUT" + "\n" * 12 + headers + resource
    digest = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
    request = urllib.request.Request(
        f"{endpoint}/{CONTAINER}?restype=container",
        method="PUT",
        headers={
            "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}",
            "Content-Length": "0",
            "x-ms-date": date,
            "x-ms-version": API_VERSION,
        },
    )
    urllib.request.urlopen(request, timeout=10).close()


def answers(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(endpoint, timeout=10).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    (port,) = find_free_ports(1)
    command = ["azurite-blob", "--location", str(tmp_path_factory.mktemp("azurite"))]
    command += ["--blobHost", "127.0.0.1", "--blobPort", str(port)]
    command += ["--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/{ACCOUNT}"
    try:
        wait_until(lambda: answers(url))
        create_container(url)
        yield url
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(autouse=True)
def azure(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", endpoint)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    monkeypatch.setenv("IMAGO_STORE_CACHE", str(tmp_path / "cache"))


def test_conditional_writes_have_one_winner():
    client = BucketClient(f"az://{CONTAINER}/conditions")
    assert client.create("latest", b"1")
    assert not client.create("latest", b"2")
    first = client.read("latest", 100)
    assert first is not None
    assert client.read_changed("latest", 100, first) is first
    assert client.replace("latest", b"3", first)
    assert not client.replace("latest", b"4", first)
    second = client.read("latest", 100)
    assert second is not None
    assert second.content == b"3"


def test_versions_are_published_moved_and_pruned():
    store = Store(f"az://{CONTAINER}/store")
    for _ in range(4):
        tiny_bundle.publish(store.location, samples=1)
    assert store.versions("colours") == [1, 2, 3, 4]
    assert store.open("colours").manifest.version == 4
    store.promote("colours", 3)
    assert store.rollback("colours") == 2
    assert store.prune("colours", keep=1) == [3]
    assert store.versions("colours") == [1, 2, 4]
    with pytest.raises(BundleError, match="has no version 3"):
        store.open("colours", 3)


def test_a_wrong_container_and_a_wrong_key_are_one_line(monkeypatch):
    with pytest.raises(StoreError, match="no such bucket; check the name"):
        Store("az://not-there/store").names()
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", base64.b64encode(bytes(64)).decode())
    with pytest.raises(StoreError, match="access denied; set AZURE_STORAGE_ACCOUNT_NAME"):
        Store(f"az://{CONTAINER}/store").names()
