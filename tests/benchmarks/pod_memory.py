"""Measure the memory that the pods take, next to what their manifests request.

    make images && python tests/benchmarks/pod_memory.py [--tag 0.1.0] [--prefix localhost/imago-]
    python tests/benchmarks/pod_memory.py --processes

Runs the images by docker/engine with the limits of k8s/base: a training of the built-in digits,
twice; then the service with one client, with 16, 64 and 200 clients that send images of 2.3
megapixels, as many as its bounds admit, and with a shadow. Then many clients at once send the
largest images that are allowed, of every format, to one worker and to two. Each figure is the peak
of what the container's control group holds, sampled twenty times a second: anonymous, shared and
kernel memory, without the page cache, which the kernel takes back when it needs it. One JSON line
each, in MiB.

With --processes only the last part runs, without containers: the service runs as processes of this
machine, and the figures are the anonymous and shared memory of all of them.
"""

import argparse
import io
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import cv2
import yaml
from PIL import Image
from project_path import ROOT
from serve_models import make_jpeg
from serving import find_descendants, find_free_port, running_server, wait_for_url

from models.image import InputSpec, decode, read_header
from models.image.decode import MAX_PIXEL_BYTES, MAX_PIXELS
from support import tiny_bundle
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
CLIENTS_PER_FORMAT = 2
LARGEST_IMAGES = 36  # that are answered
PATIENCE: dict[str, int] = {  # settings with which a machine that is busy decodes them in time
    "deadline_ms": 45_000,
    "worker_timeout_seconds": 40,
    "read_timeout_seconds": 40,
}
WORKER_COUNTS = (1, 2)
MAX_BODY_BYTES = 32 << 20
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


class PeakOfProcesses:
    """Samples what a process and its children hold until it ends; `bytes` is the most so far."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.bytes = 0
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while Path(f"/proc/{self.pid}").exists():
            pids = [self.pid, *find_descendants(self.pid)]
            self.bytes = max(self.bytes, sum(map(read_process_memory, pids)))
            time.sleep(SAMPLE_SECONDS)


def read_process_memory(pid: int) -> int:
    """Bytes of a process's anonymous memory and of its part of the shared memory."""
    total_kib = 0
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0  # it has ended
    for line in lines:
        name, _, value = line.partition(":")
        if name in ("Pss_Anon", "Pss_Shmem"):
            total_kib += int(value.split()[0])
    return total_kib << 10


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


@contextmanager
def running_pod(
    image: str, root: Path, variables: tuple[str, ...]
) -> Iterator[tuple[int, PeakMemory]]:
    """Run the service in a container; yield its port and its memory once it is ready."""
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
        yield port, peak


def measure_serving(
    image: str, root: Path, body: bytes, clients: int, variables: tuple[str, ...] = ()
) -> int:
    """The peak in bytes from the start to the end of a load of `REQUESTS` answers."""
    with running_pod(image, root, variables) as (port, peak):
        with LoadGenerator(port, body, clients) as load:
            while load.statuses.total() < REQUESTS:
                assert not load.unanswered, load.unanswered[0]
                time.sleep(SAMPLE_SECONDS)
        assert set(load.statuses) <= ALLOWED_STATUSES, load.statuses
        return peak.bytes


def build_largest_images() -> dict[str, bytes]:
    """An image file of each kind that takes as much memory as one may take."""
    kinds: dict[str, tuple[str, str, dict[str, object]]] = {
        "png": ("PNG", "RGBA", {}),
        "png of 16 bits": ("PNG", "I;16", {}),
        "gif": ("GIF", "P", {}),
        "webp": ("WEBP", "RGBA", {"lossless": True, "method": 0, "quality": 0}),
        "webp animated": ("WEBP", "RGB", {"save_all": True, "lossless": True, "method": 0}),
        "avif": ("AVIF", "RGB", {"speed": 10, "subsampling": "4:4:4"}),
        "jpeg": ("JPEG", "RGB", {}),
        "jpeg progressive": ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
        "bmp": ("BMP", "L", {}),
        "tiff": ("TIFF", "RGB", {"compression": "tiff_deflate"}),
    }
    files: dict[str, bytes] = {}
    for name, (file_format, mode, options) in kinds.items():
        small = encode_flat(file_format, mode, 64, options)
        header = read_header(small)
        pixel_bytes = header.pixel_bytes + header.extra_bytes // (64 * 64)
        pixels = min(MAX_PIXELS, MAX_PIXEL_BYTES * MAX_PIXELS // pixel_bytes)
        if name == "bmp":
            pixels = MAX_BODY_BYTES - 2048  # it is not compressed
        files[name] = encode_flat(file_format, mode, int(pixels**0.5) - 4, options)
        assert len(files[name]) <= MAX_BODY_BYTES, name
    return files


def encode_flat(file_format: str, mode: str, side: int, options: dict[str, object]) -> bytes:
    """An image file of one colour; two frames where `options` ask for all."""
    image = Image.new(mode, (side, side), 1)
    if options.get("save_all"):
        options = options | {"append_images": [Image.new(mode, (side, side), 2)]}
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def send_largest_images(port: int, images: dict[str, bytes]) -> None:
    """Send all images at once, again and again, until LARGEST_IMAGES have been answered."""
    with ExitStack() as stack:
        loads = [
            stack.enter_context(LoadGenerator(port, image, CLIENTS_PER_FORMAT))
            for image in images.values()
        ]
        # A request that is refused while its body arrives may end in a reset connection.
        while sum(load.statuses[200] for load in loads) < LARGEST_IMAGES:
            for name, load in zip(images, loads, strict=True):
                assert set(load.statuses) <= ALLOWED_STATUSES, (name, load.statuses)
            time.sleep(SAMPLE_SECONDS)


def measure_largest_in_processes(images: dict[str, bytes], store: Path, workers: int) -> int:
    """The peak in bytes of a service on this machine, with two threads in all."""
    port = find_free_port()
    settings = PATIENCE | {"workers": workers, "threads": max(1, 2 // workers), "metrics_port": 0}
    command = ["-m", "serve", "--store", str(store), "--host", "127.0.0.1", "--port", str(port)]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    with running_server(command, port, "/health/ready") as pid:
        peak = PeakOfProcesses(pid)
        send_largest_images(port, images)
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

        images = build_largest_images()
        for workers in WORKER_COUNTS:
            settings = PATIENCE | {"workers": workers, "threads": max(1, 2 // workers)}
            variables = tuple(f"IMAGO_{name.upper()}={value}" for name, value in settings.items())
            with running_pod(serve, root, variables) as (port, peak_memory):
                send_largest_images(port, images)
            print_line(describe_largest(images, workers), peak_memory.bytes, "Deployment")


def measure_processes() -> None:
    """Send the largest images to a service on this machine, and print a line for each."""
    images = build_largest_images()
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory)
        tiny_bundle.publish(store, size=224, samples=2)
        for workers in WORKER_COUNTS:
            peak = measure_largest_in_processes(images, store, workers)
            print_line(describe_largest(images, workers), peak, "Deployment")


def describe_largest(images: dict[str, bytes], workers: int) -> str:
    clients = CLIENTS_PER_FORMAT * len(images)
    return f"serving, {workers} workers, {clients} clients with the largest images of every format"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prefix", default="localhost/imago-")
    parser.add_argument("--tag", default="0.1.0")
    parser.add_argument("--processes", action="store_true", help="measure without containers")
    options = parser.parse_args()
    if options.processes:
        measure_processes()
        return

    measure_pods(
        serve=f"{options.prefix}serve:{options.tag}", train=f"{options.prefix}train:{options.tag}"
    )


if __name__ == "__main__":
    main()
