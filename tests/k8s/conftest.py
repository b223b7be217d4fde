"""Fixtures: a real cluster for the opt-in tests, and a fake kubectl for the others."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fake_kubectl import RunCluster, make_fake_cluster
from support.live_cluster import CONTEXT, image_of, kubectl, make, pod_manifest

CLEAN = ["sh", "-c", "rm -rf /store/* /data/runs"]


@pytest.fixture(scope="module")
def deployed() -> Iterator[None]:
    """Deploy the local overlay to the real cluster, and remove it after the tests."""
    subprocess.run(["kubectl", "config", "use-context", CONTEXT], check=True, capture_output=True)
    make("deploy", "OVERLAY=local")
    yield
    if not os.environ.get("IMAGO_TEST_KEEP"):
        # Files on the node outlive their claim, and the next run would serve them.
        kubectl("delete", "job", "imago-train", "--ignore-not-found", "--cascade=foreground")
        kubectl(
            "apply",
            "-f",
            "-",
            stdin=pod_manifest("clean", image_of("serve"), CLEAN, "imago-store", "imago-data"),
        )
        kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/clean", "--timeout=60s")
        make("undeploy", "OVERLAY=local", "PURGE=1")


@pytest.fixture
def cluster(tmp_path: Path) -> RunCluster:
    """Return a function that runs k8s/cluster with a fake kubectl."""
    return make_fake_cluster(tmp_path)
