"""Both images, run with the restrictions of a cluster: read-only root, numeric user, limits.

IMAGO_TEST_IMAGES names the serving and the training image; `make test-images` builds them and
sets it.
"""

import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support import ROOT
from support.load_generator import LoadGenerator
from support.server import find_free_ports, wait_until

IMAGE_NAMES = os.environ.get("IMAGO_TEST_IMAGES", "").split()
NAMES = dict(zip(("serve", "train"), IMAGE_NAMES, strict=False))
BASE = os.environ.get("BASE", "docker.io/library/python:3.11-slim-bookworm")
RUNTIME = os.environ.get("RUNTIME", "cpu")  # of the serving image
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not NAMES, reason="IMAGO_TEST_IMAGES names no images; make test-images builds them"
    ),
]
RESTRICTED = [
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--user=65532:65532",
    "--tmpfs=/tmp:rw,size=512m,mode=1777",
    "--pids-limit=512",
]
MEGABYTE = 1_000_000


Engine = Callable[..., subprocess.CompletedProcess[str]]  # the fixture `engine`


def name(kind: str) -> str:
    """Return the name and tag of the image, of "serve" or "train"."""
    return NAMES[kind]


@pytest.fixture(scope="module")
def volume(engine, tmp_path_factory) -> Path:
    """Return a volume whose store the training image has filled with the built-in digits."""
    root = tmp_path_factory.mktemp("volume")
    for part in ("store", "data"):
        (root / part).mkdir()
        (root / part).chmod(0o777)  # the user of the images does not exist on this machine
    root.chmod(0o755)
    root.parent.chmod(0o755)
    result = engine(
        "run",
        "--rm",
        *RESTRICTED,
        "--memory=3g",
        "--cpus=2",
        "--volume",
        f"{root}/store:/store",
        "--volume",
        f"{root}/data:/data",
        name("train"),
        "run",
        "digits",
        "--store=/store",
        "--trainer.default_root_dir=/data/runs",
        timeout=1500,
    )
    print(result.stdout + result.stderr)
    return root


class Service:
    """A running container of the serving image, and its ports on this machine."""

    def __init__(self, engine: Engine, store: Path, *flags: str, port: int | None = None):
        """With `port` it uses the network of this machine.

        A published port stays open longer than its container, and loses connections.
        """
        self.engine = engine
        network = ["--publish=127.0.0.1::8000", "--publish=127.0.0.1::9090"]
        if port is not None:
            network = [
                "--network=host",
                f"--env=IMAGO_PORT={port}",
                "--env=IMAGO_METRICS_PORT=0",
                "--env=IMAGO_HOST=127.0.0.1",
            ]
        started = engine(
            "run",
            "--detach",
            *RESTRICTED,
            "--memory=1g",
            "--cpus=1",
            f"--volume={store}:/store:ro",
            *network,
            *flags,
            name("serve"),
        )
        self.id = started.stdout.strip().splitlines()[-1]
        self.port = port or self.published(8000)
        self.metrics_port = 0 if port else self.published(9090)

    def published(self, port: int) -> int:
        """Return the port of this machine on which a port of the container is published."""
        return int(self.engine("port", self.id, str(port)).stdout.strip().rpartition(":")[2])

    def send(
        self, path: str, body: bytes | None = None, port: int | None = None
    ) -> tuple[int, str]:
        """GET, or POST a body. Return status and text; 0 and the error without a response."""
        url = f"http://127.0.0.1:{port or self.port}{path}"
        request = urllib.request.Request(url, body, {"Content-Type": "image/png"} if body else {})
        try:
            with urllib.request.urlopen(request, timeout=20) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def wait_ready(self) -> None:
        end = time.monotonic() + 60
        while self.send("/health/ready")[0] != 200:
            assert time.monotonic() < end, self.logs()
            time.sleep(0.2)

    def logs(self) -> str:
        result = self.engine("logs", self.id)
        return result.stdout + result.stderr


@pytest.fixture
def serve(engine):
    """Return a context manager that runs the service within its block."""

    @contextmanager
    def start(store: Path, *flags: str, port: int | None = None) -> Iterator[Service]:
        service = Service(engine, store, *flags, port=port)
        try:
            yield service
        finally:
            engine("stop", "-t", "1", service.id)
            engine("rm", "--force", service.id)

    return start


def bundle(volume: Path) -> tuple[Path, dict]:
    """Return the directory and the manifest of the trained bundle."""
    path = volume / "store/digits/1"
    return path, json.loads((path / "manifest.json").read_text())


def test_training_writes_a_bundle_into_the_volume(volume, engine):
    path, manifest = bundle(volume)
    revision = 'index .Config.Labels "org.opencontainers.image.revision"'
    label = engine(
        "image", "inspect", "--format", f"{{{{{revision}}}}}", name("train")
    ).stdout.strip()
    provenance = manifest["provenance"]
    assert provenance["git_commit"] + "-dirty" * provenance["git_dirty"] == label
    assert (volume / "store/digits/latest").readlink() == Path("1")
    assert manifest["metrics"]["test"]["accuracy"] > 0.95
    assert (path / "model.onnx").stat().st_size > 0


def test_serving_has_no_torch_no_compiler_no_pip(engine):
    script = """import importlib.util, shutil
modules = ("torch", "lightning", "pip", "setuptools", "ensurepip")
programs = ("gcc", "cc", "g++", "ld", "make", "pip", "pip3")
present = [name for name in modules if importlib.util.find_spec(name)]
print(present + [name for name in programs if shutil.which(name)])
"""
    for options in ((), ("--entrypoint=/usr/bin/env",)):
        words = ["python3", "-c", script] if options else ["-c", script]
        entry = options or ("--entrypoint=python",)
        assert (
            engine("run", "--rm", *RESTRICTED, *entry, name("serve"), *words).stdout.strip() == "[]"
        )
    search = ["/", "-xdev", "(", "-name", "pip", "-o", "-name", "torch", ")"]
    result = engine("run", "--rm", "--user=0", "--entrypoint=find", name("serve"), *search)
    assert result.stdout.strip() == ""


def test_the_serving_image_manages_its_store(volume, engine):
    """The operator's commands run in it."""
    result = engine(
        "run",
        "--rm",
        *RESTRICTED,
        "--volume",
        f"{volume / 'store'}:/store:ro",
        "--entrypoint=python",
        name("serve"),
        *("-m", "models", "list"),
    )
    assert "digits" in result.stdout


@pytest.mark.parametrize("kind", ["serve", "train"])
def test_each_debian_package_has_its_licence(engine, kind):
    script = """for package in $(dpkg-query -W -f '${Package} '); do
  [ -e "/usr/share/doc/$package/copyright" ] || echo "$package"
done
ls -d /usr/share/doc/dpkg"""
    result = engine("run", "--rm", *RESTRICTED, "--entrypoint=sh", name(kind), "-c", script)
    assert result.stdout.split() == ["/usr/share/doc/dpkg"]


@pytest.mark.skipif(
    RUNTIME != "cpu", reason="the limit is that of the image without CUDA and OpenVINO"
)
def test_serving_is_small(engine):
    size = int(engine("image", "inspect", "--format", "{{.Size}}", name("serve")).stdout)
    assert size <= 450 * MEGABYTE, f"{size / MEGABYTE:.0f} MB"


@pytest.mark.parametrize("kind", ["serve", "train"])
def test_images_have_user_stop_signal_and_labels(engine, kind):
    (image,) = json.loads(engine("image", "inspect", name(kind)).stdout)
    config = image["Config"]
    assert config["User"] == "65532:65532"
    assert config["StopSignal"] in ("SIGTERM", "15")
    labels = config["Labels"]
    assert labels["org.opencontainers.image.title"] == f"Imago {kind}"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.version"] == name(kind).rpartition(":")[2].removesuffix(
        f"-{RUNTIME}"
    )
    assert labels["org.opencontainers.image.base.name"] == BASE
    assert labels["org.opencontainers.image.source"]
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", labels["org.opencontainers.image.revision"])
    environment = " ".join(config["Env"]).lower()
    assert not re.search(r"password|secret|token|index|://", environment)


def test_no_layer_contains_the_package_index(engine):
    for kind in ("serve", "train"):
        history = engine("history", "--no-trunc", name(kind)).stdout
        assert "extra-index" not in history
        search = ["/", "-xdev", "-name", "pip.conf"]
        result = engine("run", "--rm", "--user=0", "--entrypoint=find", name(kind), *search)
        assert result.stdout.strip() == "", "a machine's pip settings are in the image"


@pytest.mark.parametrize("kind", ["serve", "train"])
def test_a_second_build_gives_the_same_layers(engine, kind):
    """Build without the cache."""
    if "Podman" not in engine("version").stdout:
        pytest.skip("docker keeps the times of files")
    flags = os.environ.get("BUILD_FLAGS", "")
    settings = {
        "PREFIX": "localhost/imago-again-",
        "TAG": "test",
        "BUILD_FLAGS": f"{flags} --no-cache",
    }
    subprocess.run(
        [ROOT / "docker/build", kind], env=os.environ | settings, check=True, capture_output=True
    )
    suffix = f"-{RUNTIME}" if kind == "serve" and RUNTIME != "cpu" else ""
    rebuilt = f"localhost/imago-again-{kind}:test{suffix}"
    try:
        assert read_layers(engine, name(kind)) == read_layers(engine, rebuilt)
    finally:
        engine("rmi", rebuilt)


def read_layers(engine: Engine, image: str) -> list[str]:
    """Return the digests of an image's layers."""
    (description,) = json.loads(engine("image", "inspect", image).stdout)
    return description["RootFS"]["Layers"]


def test_the_trained_bundle_is_served(volume, serve):
    path, manifest = bundle(volume)
    flags = ("--env=IMAGO_MODEL=digits", "--user=12345:54321")  # any user can run it
    with serve(volume / "store", *flags) as service:
        service.wait_ready()
        correct = 0
        for sample in manifest["samples"]:
            image = (path / "samples" / sample["file"]).read_bytes()
            status, answer = service.send("/predict", image)
            assert status == 200, answer
            correct += json.loads(answer)["predictions"][0]["index"] == sample["label"]
        assert correct >= 0.9 * len(manifest["samples"])
        assert service.send("/predict", b"\x89PNG\r\n\x1a\nno picture")[0] == 422
        status, metrics = service.send("/metrics", port=service.metrics_port)
        assert status == 200
        assert f'imago_requests_total{{code="200"}} {len(manifest["samples"])}' in metrics
        assert 'imago_requests_total{code="422"} 1' in metrics
        assert "imago_ready 1" in metrics
        assert 'name="digits"' in metrics


def health_check(engine: Engine) -> list[str]:
    """Return the command of the image's health check."""
    (image,) = json.loads(engine("image", "inspect", name("serve")).stdout)
    health = image["Config"].get("Healthcheck") or image["Healthcheck"]  # docker; podman
    kind, *command = health["Test"]
    assert kind == "CMD"
    return command


def test_the_health_check_of_the_image(volume, serve, engine):
    with serve(volume / "store") as service:
        service.wait_ready()
        assert engine("exec", service.id, *health_check(engine)).returncode == 0


def test_the_health_check_fails_with_a_damaged_bundle(damaged, engine):
    """The service exits; a shell keeps its container for the health check."""
    script = 'python -m serve; echo "ended with $?"; exec "$@"'
    result = engine(
        "run",
        "--rm",
        *RESTRICTED,
        "--memory=1g",
        "--cpus=1",
        "--volume",
        f"{damaged}:/store:ro",
        "--entrypoint=sh",
        name("serve"),
        "-c",
        script,
        "sh",
        *health_check(engine),
        check=False,
    )
    assert "ended with 2" in result.stdout, result.stdout + result.stderr
    assert result.returncode == 1, result.stderr


def test_sigterm_under_load_loses_no_request(volume, serve, engine):
    path, manifest = bundle(volume)
    image = (path / "samples" / manifest["samples"][0]["file"]).read_bytes()
    with serve(volume / "store", port=find_free_ports(1)[0]) as service:
        service.wait_ready()
        with LoadGenerator(service.port, image, clients=8, pause=0.002) as load:
            wait_until(lambda: load.statuses[200] >= 200, seconds=30)
            engine("kill", "--signal=TERM", service.id)
            assert engine("wait", service.id).stdout.strip() == "0", service.logs()
        assert load.unanswered == []
        assert set(load.statuses) <= {200, 503}


@pytest.fixture
def damaged(volume, tmp_path) -> Path:
    """Return a store with a damaged bundle."""
    shutil.copytree(volume / "store", tmp_path / "store", symlinks=True)
    tmp_path.chmod(0o755)
    graph = tmp_path / "store/digits/1/model.onnx"
    graph.chmod(0o644)
    graph.write_bytes(graph.read_bytes()[:-8] + b"damaged!")
    return tmp_path / "store"


def test_a_damaged_bundle_never_becomes_ready(damaged, serve):
    with serve(damaged, port=find_free_ports(1)[0]) as service:
        wait_until(lambda: "model.onnx" in service.logs(), seconds=60)
        assert service.send("/health/ready")[0] != 200
        assert service.send("/predict", b"x")[0] != 200
