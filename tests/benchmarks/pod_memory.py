"""Measure the memory that the pods take, next to what their manifests request.

    make images && python tests/benchmarks/pod_memory.py [--tag 0.1.0] [--prefix localhost/imago-]

Runs the images by docker/engine with the limits of k8s/base: a training of the built-in digits,
twice; then the service with one client, with 16, 64 and 200 clients that send images of 2.3
megapixels, as many as its bounds admit, and with a shadow. Each figure is the peak of what the
container's control group holds, sampled twenty times a second: anonymous, shared and kernel memory,
without the page cache, which the kernel takes back when it needs it. One JSON line each, in MiB.
"""

import argparse
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import yaml
from project_path import ROOT
from serve_models import make_jpeg
from serving import find_free_port, wait_for_url

from models.image import InputSpec, decode
from support.load_generator import LoadGenerator

RESTRICTED = [
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--user=65532:65532",
    "--tmpfs=/tmp:rw,size=512m,mode=1777",
]
CLIENT_COUNTS = (16, 64, 200)
REQUESTS = 256
ALLOWED_STATUSES = {200, 429, 504}  # many clients may reach the service's bounds
SAMPLE_SECONDS = 0.05
MIB = 1 << 20

Resources = dict[str, dict[str, str]]


def run_engine(*words: str | Path) -> str:
    """Run docker or podman and return what it prints."""
    result = subprocess.run([ROOT / "docker/engine", *words], capture_output=True, text=True)
    assert result.returncode == 0, f"{words}: {result.stderr}"
    return result.stdout.strip()


def read_resources(kind: str) -> Resources:
    """The requests and limits of the only workload of this kind in k8s/base."""
    command = ["kubectl", "kustomize", ROOT / "k8s/base"]
    rendered = subprocess.run(command, capture_output=True, check=True).stdout
    manifests = yaml.safe_load_all(rendered)
    workload = next(manifest for manifest in manifests if manifest["kind"] == kind)
    return workload["spec"]["template"]["spec"]["containers"][0]["resources"]


class PeakMemory:
    """Samples what a container's control group holds until it ends; `bytes` is the most so far."""

    def __init__(self, container: str) -> None:
        pid = run_engine("inspect", "--format", "{{.State.Pid}}", container)
        self.bytes = 0
        self._stat_file, self._kernel_file = find_memory_files(pid)
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        try:
            while True:
                self.bytes = max(self.bytes, read_memory(self._stat_file, self._kernel_file))
                time.sleep(SAMPLE_SECONDS)
        except OSError:
            return  # the control group is gone


def find_memory_files(pid: str) -> tuple[Path, Path | None]:
    """The memory.stat of a process's control group, and the file with the kernel's memory.

    The second is None for control groups version 2, whose memory.stat includes it.
    """
    groups: dict[str, str] = {}
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        groups[controllers] = path

    if "memory" in groups:  # version 1
        group = Path("/sys/fs/cgroup/memory" + groups["memory"])
        return group / "memory.stat", group / "memory.kmem.usage_in_bytes"
    return Path("/sys/fs/cgroup" + groups[""]) / "memory.stat", None


def read_memory(stat_file: Path, kernel_file: Path | None) -> int:
    """Bytes of anonymous, shared and kernel memory."""
    values: dict[str, int] = {}
    for line in stat_file.read_text().splitlines():
        name, value = line.split()
        values[name] = int(value)

    if kernel_file:
        return values["total_rss"] + values["total_shmem"] + int(kernel_file.read_text())
    return values["anon"] + values["shmem"] + values["kernel"]


@contextmanager
def running_container(
    image: str,
    resources: Resources,
    volumes: list[str],
    command: str = "",
    variables: tuple[str, ...] = (),
) -> Iterator[str]:
    """Run a container under the limits of its pod; yield its id."""
    memory = resources["limits"]["memory"].removesuffix("i").lower()
    container = run_engine(
        "run",
        "--detach",
        *RESTRICTED,
        f"--memory={memory}",
        f"--cpus={resources['limits']['cpu']}",
        "--network=host",
        *(f"--volume={volume}" for volume in volumes),
        *(f"--env={variable}" for variable in variables),
        image,
        *command.split(),
    ).splitlines()[-1]
    try:
        yield container
    finally:
        run_engine("rm", "--force", container)


def measure_training(image: str, root: Path) -> int:
    """The peak in bytes of a training of the built-in digits."""
    volumes = [f"{root}/store:/store", f"{root}/data:/data"]
    command = "run digits --store=/store --trainer.default_root_dir=/data/runs --fresh"
    with running_container(image, read_resources("Job"), volumes, command) as container:
        peak = PeakMemory(container)
        assert run_engine("wait", container) == "0", run_engine("logs", container)
        return peak.bytes


def measure_serving(
    image: str, root: Path, body: bytes, clients: int, variables: tuple[str, ...] = ()
) -> int:
    """The peak in bytes from the start to the end of a load of `REQUESTS` answers."""
    port = find_free_port()
    variables = (
        *variables,
        f"IMAGO_PORT={port}",
        "IMAGO_METRICS_PORT=0",
        "IMAGO_HOST=127.0.0.1",
        "IMAGO_MODEL=digits",
    )
    resources = read_resources("Deployment")
    volumes = [f"{root}/store:/store:ro"]
    with running_container(image, resources, volumes, variables=variables) as container:
        peak = PeakMemory(container)
        wait_for_url(f"http://127.0.0.1:{port}/health/ready")
        with LoadGenerator(port, body, clients) as load:
            while load.statuses.total() < REQUESTS:
                assert not load.unanswered, load.unanswered[0]
                time.sleep(SAMPLE_SECONDS)
        assert set(load.statuses) <= ALLOWED_STATUSES, load.statuses
        return peak.bytes


def print_line(pod: str, peak: int, kind: str) -> None:
    resources = read_resources(kind)
    line = {
        "pod": pod,
        "peak_mib": round(peak / MIB),
        "requests": resources["requests"]["memory"],
        "limits": resources["limits"]["memory"],
    }
    print(json.dumps(line), flush=True)


def measure_pods(serve: str, train: str) -> None:
    """Measure the two images and print a line for each pod."""
    spec = InputSpec(height=1200, width=1920, channels=3)
    pixels = decode(make_jpeg(1200, 1920), spec)
    small = cv2.imencode(".png", pixels[:8, :8])[1].tobytes()
    large = cv2.imencode(".png", pixels)[1].tobytes()

    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for folder in (root, root / "store", root / "data"):
            folder.mkdir(exist_ok=True)
            os.chmod(folder, 0o777)  # the user of the images does not exist on this machine

        print_line("training, digits", measure_training(train, root), "Job")
        measure_training(train, root)  # a second version, for the shadow

        peak = measure_serving(serve, root, small, 1)
        print_line("serving, digits", peak, "Deployment")
        for clients in CLIENT_COUNTS:
            size = f"{len(large) / MIB:.1f} MiB"
            pod = f"serving, {clients} clients with PNGs of 2.3 megapixels, {size} each"
            print_line(pod, measure_serving(serve, root, large, clients), "Deployment")
        peak = measure_serving(serve, root, small, 1, ("IMAGO_SHADOW_VERSION=1",))
        print_line("serving, with a shadow", peak, "Deployment")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prefix", default="localhost/imago-")
    parser.add_argument("--tag", default="0.1.0")
    options = parser.parse_args()

    measure_pods(
        serve=f"{options.prefix}serve:{options.tag}", train=f"{options.prefix}train:{options.tag}"
    )


if __name__ == "__main__":
    main()
