"""The cluster of the opt-in tests (see cluster.py), and the one that stands in for it in the others (standin.py)."""

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
    subprocess.run(["kubectl", "config", "use-context", CONTEXT], check=True, capture_output=True)
    make("deploy", "OVERLAY=local")
    yield
    if not os.environ.get("IMAGO_TEST_KEEP"):
        # What lies on the node outlives its claim, and the next run would serve it.
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
    return make_fake_cluster(tmp_path)
