"""Worker processes in a container: little shared memory."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pictures import folder

ROOT = Path(__file__).parents[2]
LITTLE_SHM = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]
MOUNTS = shutil.which("unshare") and subprocess.run([*LITTLE_SHM, "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not MOUNTS, reason="no mounts of one's own here")
def test_shared_memory_may_be_too_small_for_a_batch(tmp_path):
    source = folder(tmp_path / "photos", count=40, size=128)
    script = ("import sys; from zlib import crc32; from train.data import ImageData\n"
              "for memory in 'memory', 'stream':\n"
              "    data = ImageData(sys.argv[1], memory=memory, workers=int(sys.argv[2]), size=128, cache='')\n"
              "    data.setup()\n"
              "    print(*[crc32(images.numpy().tobytes()) for images, _ in data.train_dataloader()])\n")
    plain, little = (subprocess.run([*place, sys.executable, "-c", script, str(source), workers], cwd=ROOT, check=True,
                                    timeout=100, capture_output=True, text=True).stdout.splitlines()
                     for place, workers in (([], "0"), (LITTLE_SHM, "2")))
    assert little == plain
    assert len(set(plain)) == 1
