"""Copies of run directories in a bucket, from which a run resumes on another machine.

    <url>/<name>/<number>/settings.json      what decides the run, and the machine that began it
    <url>/<name>/<number>/<snapshot>/…       files of the run directory, with its newest checkpoint
    <url>/<name>/<number>/newest             names the snapshot that is complete
    <url>/<name>/<number>/finished           exists where the run is finished

After each checkpoint a thread uploads a snapshot; `newest` is written when all of it is there, so a
snapshot appears whole or not at all. A write on a condition decides who begins a number, and who
may write a run: where another process has resumed it, this one stops uploading.
"""

import json
import os
import secrets
import shutil
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from models.store import StoreError
from models.store.bucket_client import BucketClient, StoredObject
from train.runs.checkpoints import checkpoint_step, list_checkpoints

SETTINGS_FILE = "settings.json"
FINISHED_FILE = "finished"
NEWEST_OBJECT = "newest"
MAX_SETTINGS_BYTES = 4 << 20
MAX_NEWEST_BYTES = 1 << 20
PATIENCE_SECONDS = 5.0  # between two looks for a snapshot that waits


class RunMirror:
    """The runs of one model below `url`. Methods raise StoreError where it can't be used."""

    def __init__(self, url: str, name: str):
        self.url = f"{url.rstrip('/')}/{name}"
        self._client = BucketClient(self.url)
        self._directory: Path | None = None  # of the run whose checkpoints are uploaded
        self._known: StoredObject | None = None  # `newest`, as this process has read or written it
        self._pending: Path | None = None  # a snapshot that is not uploaded yet
        self._uploaded = ""  # name of the last snapshot
        self._condition = threading.Condition()
        self._is_closing = False
        self._is_taken = False  # another process writes this run
        self._thread: threading.Thread | None = None

    # Before a run

    def fetch(self, directory: Path) -> None:
        """Let each run of the bucket have a directory here, the newest one with its files."""
        objects = self._client.list_objects("")
        numbers = {int(path.split("/")[0]) for path in objects if path.split("/")[0].isdecimal()}
        for number in sorted(numbers):
            target = directory / str(number)
            if f"{number}/{SETTINGS_FILE}" not in objects:
                continue
            if not (target / SETTINGS_FILE).exists():
                target.mkdir(parents=True, exist_ok=True)
                self._client.download(f"{number}/{SETTINGS_FILE}", target / SETTINGS_FILE)
            if f"{number}/{FINISHED_FILE}" in objects:
                (target / FINISHED_FILE).touch()
            elif number == max(numbers):
                self.fetch_snapshot(number, target)

    def fetch_snapshot(self, number: int, target: Path) -> None:
        """Copy the newest snapshot of a run, unless there is a newer checkpoint here."""
        newest = self._client.read(f"{number}/{NEWEST_OBJECT}", MAX_NEWEST_BYTES)
        if newest is None:
            return
        snapshot = json.loads(newest.content)
        checkpoints = list_checkpoints(target)
        if checkpoints and checkpoint_step(checkpoints[0]) >= snapshot["step"]:
            return
        # The checkpoint is renamed last, as the run resumes from it.
        for file in sorted(snapshot["files"], key=lambda file: file == snapshot["checkpoint"]):
            path = target / file
            path.parent.mkdir(parents=True, exist_ok=True)
            staged = path.with_name(f".{path.name}.fetched")
            sha256 = self._client.download(f"{number}/{snapshot['snapshot']}/{file}", staged)
            if sha256 is None:
                staged.unlink()
                raise StoreError(
                    f"{self.url}/{number}/{snapshot['snapshot']}/{file}: no such object; remove "
                    f"{self.url}/{number}/{NEWEST_OBJECT} to start the run over"
                )
            staged.replace(path)

    def claim(self, number: int, settings: dict[str, Any]) -> bool:
        """Begin the run of this number; return False where another machine has begun it."""
        owner = {"machine": socket.gethostname(), "token": secrets.token_hex(8)}
        content = json.dumps({**settings, "begun_by": owner}, indent=1, sort_keys=True)
        return self._client.create(f"{number}/{SETTINGS_FILE}", content.encode())

    # During a run

    def start(self, directory: Path) -> None:
        """Upload the checkpoints of this run from now on."""
        self._directory = directory
        self._known = self._client.read(f"{directory.name}/{NEWEST_OBJECT}", MAX_NEWEST_BYTES)
        if self._known is not None:
            self._uploaded = json.loads(self._known.content)["snapshot"]
        self._thread = threading.Thread(target=self._upload_pending, name="run-mirror", daemon=True)
        self._thread.start()

    def upload_soon(self) -> None:
        """Upload the run as it is now, in the background. A snapshot that still waits is replaced.

        Large files are linked, not copied: they are replaced as a whole, never changed.
        """
        directory = self._directory
        checkpoints = list_checkpoints(directory) if directory is not None else []
        if directory is None or not checkpoints or self._is_taken:
            return
        step = checkpoint_step(checkpoints[0])
        snapshot = directory.parent / f".upload-{directory.name}" / f"{step:09d}-{os.getpid()}"
        shutil.rmtree(snapshot, ignore_errors=True)
        for path in directory.rglob("*"):
            is_other = path in checkpoints[1:] or path.name.startswith(".")
            if is_other or path.name == SETTINGS_FILE or not path.is_file():
                continue
            target = snapshot / path.relative_to(directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".ckpt":
                os.link(path, target)
            else:
                shutil.copyfile(path, target)
        with self._condition:
            if self._pending is not None:
                shutil.rmtree(self._pending, ignore_errors=True)
            self._pending = snapshot
            self._condition.notify()

    def close(self) -> None:
        """Wait until the last snapshot is uploaded, and stop."""
        if self._thread is None:
            return
        with self._condition:
            self._is_closing = True
            self._condition.notify()
        self._thread.join()
        assert self._directory is not None
        shutil.rmtree(self._directory.parent / f".upload-{self._directory.name}", True)

    def finish(self) -> None:
        """Mark the run as finished, and delete its snapshots: its bundle is published."""
        assert self._directory is not None
        self.close()
        number = self._directory.name
        kept = (f"{number}/{SETTINGS_FILE}", f"{number}/{FINISHED_FILE}")
        try:
            self._client.create(f"{number}/{FINISHED_FILE}", b"")
            objects = self._client.list_objects(f"{number}/")
            self._client.delete([path for path in objects if path not in kept])
        except StoreError as error:
            print(f"train: {error}; the run is finished, but not marked there", file=sys.stderr)

    def discard(self, number: str) -> None:
        """Delete what there is of a run that failed to start."""
        self.close()
        self._client.delete(list(self._client.list_objects(f"{number}/")))

    def _upload_pending(self) -> None:
        """Upload snapshots until the mirror closes and none waits."""
        while True:
            with self._condition:
                while self._pending is None and not self._is_closing:
                    self._condition.wait(PATIENCE_SECONDS)
                snapshot = self._pending
                self._pending = None
            if snapshot is None:
                return
            try:
                self._upload(snapshot)
            except (StoreError, OSError) as error:
                print(
                    f"train: {error}; the checkpoint is on this machine only, and the next one "
                    "is uploaded again",
                    file=sys.stderr,
                    flush=True,
                )
            shutil.rmtree(snapshot, ignore_errors=True)

    def _upload(self, directory: Path) -> None:
        assert self._directory is not None
        number = self._directory.name
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        names = [path.relative_to(directory).as_posix() for path in files]
        checkpoint = list_checkpoints(directory)[0]
        snapshot = f"{checkpoint_step(checkpoint):09d}-{secrets.token_hex(4)}"
        for path, name in zip(files, names, strict=True):
            self._client.upload(path, f"{number}/{snapshot}/{name}")

        description = {
            "snapshot": snapshot,
            "step": checkpoint_step(checkpoint),
            "checkpoint": checkpoint.name,
            "files": names,
        }
        content = json.dumps(description, indent=1).encode()
        path_of_newest = f"{number}/{NEWEST_OBJECT}"
        if self._known is None:
            is_written = self._client.create(path_of_newest, content)
        else:
            is_written = self._client.replace(path_of_newest, content, self._known)
        if not is_written:
            self._is_taken = True
            raise StoreError(f"{self.url}/{number}: another process continues this run")

        self._known = self._client.read(path_of_newest, MAX_NEWEST_BYTES)
        if self._uploaded:
            self._client.delete(list(self._client.list_objects(f"{number}/{self._uploaded}/")))
        self._uploaded = snapshot
