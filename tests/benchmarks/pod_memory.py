"""What the pods take of memory, beside what their manifests ask for.

    make images && python tests/benchmarks/pod_memory.py [--tag 0.1.0] [--prefix localhost/imago-]

Runs the images by docker/engine with the limits of k8s/base: a training of the embedded default, twice; then the
service with one client, with 16, 64 and 200 clients that send images of 2.3 megapixels, as many as its bounds let in,
and with a shadow beside it. Each figure is the peak of what its control group holds for itself, looked at twenty times
a second: anonymous and shared memory and the kernel's own, without the cache of files, which the kernel takes back when
it needs it. One JSON line each, in MiB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT)]

import cv2  # noqa: E402
import yaml  # noqa: E402
from serve_models import picture  # noqa: E402
from serve_speed import free_port  # noqa: E402
from support.load_generator import LoadGenerator  # noqa: E402

from models.image import InputSpec, decode  # noqa: E402

RESTRICTED = [
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--user=65532:65532",
    "--tmpfs=/tmp:rw,size=512m,mode=1777",
]
CLIENTS, REQUESTS = (16, 64, 200), 256
MIB = 1 << 20


def engine(*words: str | Path) -> str:
    done = subprocess.run([ROOT / "docker/engine", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout.strip()


def limits(kind: str) -> dict[str, dict[str, str]]:
    """The resources of the only workload of this kind in k8s/base."""
    rendered = subprocess.run(
        ["kubectl", "kustomize", ROOT / "k8s/base"], capture_output=True, check=True
    ).stdout
    found = next(d for d in yaml.safe_load_all(rendered) if d["kind"] == kind)
    return found["spec"]["template"]["spec"]["containers"][0]["resources"]


class Peak:
    """The most that a container's control group held for itself, in bytes, until it ends."""

    def __init__(self, container: str):
        pid = engine("inspect", "--format", "{{.State.Pid}}", container)
        self.files, self.bytes = files(pid), 0
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self) -> None:
        try:
            while True:
                self.bytes = max(self.bytes, held(*self.files))
                time.sleep(0.05)
        except OSError:
            return  # the group is gone


def files(pid: str) -> tuple[Path, Path | None]:
    """memory.stat of a process's control group, and what the kernel's own is in where that does not tell."""
    groups = dict(
        line.split(":", 2)[1:] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    )
    if "memory" in groups:  # version 1
        group = Path("/sys/fs/cgroup/memory" + groups["memory"])
        return group / "memory.stat", group / "memory.kmem.usage_in_bytes"
    return Path("/sys/fs/cgroup" + groups[""]) / "memory.stat", None


def held(stat: Path, kernel: Path | None) -> int:
    found = {name: int(value) for name, value in map(str.split, stat.read_text().splitlines())}
    if kernel:
        return found["total_rss"] + found["total_shmem"] + int(kernel.read_text())
    return found["anon"] + found["shmem"] + found["kernel"]


@contextmanager
def running(image: str, resources: dict, volumes: list[str], *words: str) -> Iterator[str]:
    """A container under the limits of its pod."""
    memory = resources["limits"]["memory"].removesuffix("i").lower()
    container = engine(
        "run",
        "--detach",
        *RESTRICTED,
        f"--memory={memory}",
        f"--cpus={resources['limits']['cpu']}",
        "--network=host",
        *(f"--volume={v}" for v in volumes),
        *words[:-1],
        image,
        *words[-1].split(),
    ).splitlines()[-1]
    try:
        yield container
    finally:
        engine("rm", "--force", container)


def training(image: str, root: Path) -> int:
    volumes = [f"{root}/store:/store", f"{root}/data:/data"]
    command = "run digits --store=/store --trainer.default_root_dir=/data/runs --fresh"
    with running(image, limits("Job"), volumes, command) as container:
        peak = Peak(container)
        assert engine("wait", container) == "0", engine("logs", container)
        return peak.bytes


def serving(image: str, root: Path, body: bytes, clients: int, *settings: str) -> int:
    """The peak from the start to the end of a load: `REQUESTS` answers, one by one or to so many clients at once."""
    port = free_port()
    settings = (
        *settings,
        f"IMAGO_PORT={port}",
        "IMAGO_METRICS_PORT=0",
        "IMAGO_HOST=127.0.0.1",
        "IMAGO_MODEL=digits",
    )
    with running(
        image,
        limits("Deployment"),
        [f"{root}/store:/store:ro"],
        *(f"--env={s}" for s in settings),
        "",
    ) as container:
        peak = Peak(container)
        await_ready(port, container)
        with LoadGenerator(port, body, clients) as load:
            while load.statuses.total() < REQUESTS:
                assert not load.unanswered, load.unanswered[0]
                time.sleep(0.05)
        assert set(load.statuses) <= {200, 429, 504}, load.statuses  # bounds may be reached
        return peak.bytes


def await_ready(port: int, container: str) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            return urllib.request.urlopen(
                f"http://127.0.0.1:{port}/health/ready", timeout=5
            ).close()
        except OSError:
            assert time.monotonic() < end, engine("logs", container)
            time.sleep(0.1)


def main(serve: str, train: str) -> None:
    large = decode(picture(1200, 1920), InputSpec(height=1200, width=1920, channels=3))
    small, large = (cv2.imencode(".png", pixels)[1].tobytes() for pixels in (large[:8, :8], large))
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for folder in (root, root / "store", root / "data"):
            folder.mkdir(exist_ok=True)
            os.chmod(folder, 0o777)  # the user of the images is nobody's user here
        show("training, digits", training(train, root), "Job")
        training(train, root)  # a second version, for the shadow
        show("serving, digits", serving(serve, root, small, 1), "Deployment")
        for clients in CLIENTS:
            show(
                f"serving, {clients} clients with PNGs of 2.3 megapixels, {len(large) / MIB:.1f} MiB each",
                serving(serve, root, large, clients),
                "Deployment",
            )
        show(
            "serving, with a shadow",
            serving(serve, root, small, 1, "IMAGO_SHADOW_VERSION=1"),
            "Deployment",
        )


def show(pod: str, peak: int, kind: str) -> None:
    asked = limits(kind)
    print(
        json.dumps(
            {
                "pod": pod,
                "peak_mib": round(peak / MIB),
                "requests": asked["requests"]["memory"],
                "limits": asked["limits"]["memory"],
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prefix", default="localhost/imago-")
    parser.add_argument("--tag", default="0.1.0")
    given = parser.parse_args()
    main(*(f"{given.prefix}{kind}:{given.tag}" for kind in ("serve", "train")))
