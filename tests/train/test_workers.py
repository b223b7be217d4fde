"""Decoding workers in a container with little shared memory and a CPU quota."""

import os
import shutil
import subprocess
import sys
import zlib

import pytest

from support import ROOT
from support.sample_images import write_image_folder
from train.data import ImageData

import lightning as L  # isort: skip  (it needs what train declares beside a CPU torch)

INSIDE = ["unshare", "-rm", "sh", "-c"]  # with mounts that only this process sees
LITTLE_SHM = [*INSIDE, 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]
ONE_CORE = [
    *INSIDE,
    'mount -t tmpfs tmpfs /sys/fs/cgroup && echo 50000 100000 >/sys/fs/cgroup/cpu.max && exec "$@"',
    "sh",
]
CAN_MOUNT = (
    shutil.which("unshare")
    and subprocess.run([*LITTLE_SHM, "true"], capture_output=True).returncode == 0
)


@pytest.mark.slow
@pytest.mark.skipif(not CAN_MOUNT, reason="needs a user namespace with mounts")
def test_shared_memory_may_be_too_small_for_a_batch(tmp_path):
    source = write_image_folder(tmp_path / "photos", count=40, size=128)
    script = (
        "import sys; from zlib import crc32; from train.data import ImageData\n"
        "for memory in 'memory', 'stream':\n"
        "    data = ImageData(sys.argv[1], memory=memory, workers=2, size=128, cache='')\n"
        "    data.setup()\n"
        "    print(*[crc32(images.numpy().tobytes()) for images, _ in data.train_dataloader()])\n"
    )
    little = subprocess.run(
        [*LITTLE_SHM, sys.executable, "-c", script, str(source)],
        cwd=ROOT,
        check=True,
        timeout=100,
        capture_output=True,
        text=True,
    ).stdout.splitlines()

    data = ImageData(str(source), workers=0, size=128, cache="")
    data.setup()
    plain = [zlib.crc32(images.numpy().tobytes()) for images, _ in data.train_dataloader()]
    assert little == [" ".join(map(str, plain))] * 2


@pytest.mark.slow
@pytest.mark.skipif(
    not CAN_MOUNT or len(os.sched_getaffinity(0)) < 2,
    reason="needs a user namespace with mounts, and two cores",
)
def test_a_job_uses_no_more_cores_than_its_quota(tmp_path):
    script = (
        "import runpy, sys\n"
        "try: runpy.run_module('train', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: assert not end.code\n"
        "import torch\n"
        "from models.cpu_quota import available_cores\n"
        "from train.data import ImageData\n"
        "from train.export.provenance import device_name\n"
        "print(torch.get_num_threads(), ImageData().workers, available_cores())\n"
        "print(device_name(torch.device('cpu')))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    *_, numbers, device = subprocess.run(
        [*ONE_CORE, sys.executable, "-c", script, "run", "digits", "--trainer.fast_dev_run", "1"],
        cwd=ROOT,
        check=True,
        timeout=250,
        capture_output=True,
        text=True,
        env={**environment, "XDG_CACHE_HOME": str(tmp_path)},
    ).stdout.splitlines()
    assert numbers == "1 1 1"
    assert device.endswith(", 1 cores")


def test_processes_of_a_node_share_its_cores():
    one_process = ImageData("digits")
    by_default = ImageData("digits")
    as_set = ImageData("digits", workers=3)
    trainer = L.Trainer(accelerator="cpu", devices=2, logger=False)
    by_default.attach_trainer(trainer)
    as_set.attach_trainer(trainer)

    assert by_default.workers == max(1, one_process.workers // 2)
    assert as_set.workers == 3
