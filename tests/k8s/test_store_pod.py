"""`make models`, `promote` and `rollback`: a restricted pod that works on the cluster's store."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from models.store import Store
from support import ROOT, tiny_bundle
from support.fake_kubectl import error_line, needs_kubectl, run_cluster_script
from support.manifests import Manifest, manifests_of_kind

pytestmark = needs_kubectl


@pytest.fixture
def run_verb(cluster, tmp_path) -> Callable:
    """Run a verb on a cluster with the local overlay. Return the result, the calls and the pod."""

    def run(
        verb: str,
        phase: str = "Succeeded",
        log: str = "done",
        case: str = "overlays/local",
        **env: str,
    ) -> tuple:
        created = tmp_path / "pod"
        deployment = tmp_path / "deployment.yaml"
        deployment.write_text(yaml.safe_dump(read_deployment(case)))
        # The real kubectl reads the fields of the Deployment.
        query = f"for words; do :; done; exec {shutil.which('kubectl')} annotate --local a=b"
        answers = {
            "get deployment imago-serving": f'{query} -f {deployment} -o "$words"',
            "create -f -": f"cat >{created}",
            "get pod imago-models-": f"echo {phase}",
            "logs imago-models-": shlex.join(["echo", log]),
        }
        result, calls = cluster(verb, answers, **env)
        return result, calls, json.loads(created.read_text()) if created.exists() else None

    return run


def read_deployment(case: str = "overlays/local") -> Manifest:
    (deployment,) = manifests_of_kind(case, "Deployment")
    return deployment


def run_container(pod: Manifest, store: Path) -> subprocess.CompletedProcess[str]:
    """Run the command of the pod here, with the settings of the local overlay."""
    (container,) = pod["spec"]["containers"]
    settings = {"IMAGO_STORE": str(store), "IMAGO_MODEL": "digits"}
    arguments = [
        re.sub(r"\$\((\w+)\)", lambda match: settings[match[1]], argument)
        for argument in container["args"]
    ]
    assert container["command"] == ["python"]
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )


@pytest.mark.parametrize(
    ("verb", "env", "latest"),
    [
        ("rollback", {}, 2),
        ("rollback", {"VERSION": "1"}, 1),
        ("promote", {"VERSION": "1", "NAME": "digits"}, 1),
        ("models", {}, 3),
    ],
)
def test_the_pod_does_what_the_verb_says(verb, env, latest, run_verb, tmp_path):
    for _ in range(3):
        tiny_bundle.publish(tmp_path / "store", "digits")
    result, _, pod = run_verb(verb, log=f"{verb} said this", **env)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{verb} said this\n"

    container = run_container(pod, tmp_path / "store")
    assert container.returncode == 0, container.stderr
    assert Store(tmp_path / "store").latest("digits") == latest


def test_the_pod_is_restricted_and_mounts_the_store_of_the_deployment(run_verb):
    result, calls, pod = run_verb("rollback")
    assert result.returncode == 0, result.stderr
    kubernetes_validate.validate(pod, "1.30", strict=True)

    spec = pod["spec"]
    (container,) = spec["containers"]
    deployed = read_deployment()["spec"]["template"]["spec"]
    (serve,) = deployed["containers"]
    assert container["image"] == serve["image"]
    assert container["envFrom"] == serve["envFrom"]
    (store,) = (m for m in container["volumeMounts"] if m["name"] == "store")
    assert store == {"name": "store", "mountPath": "/store", "subPath": "imago/store"}
    assert deployed["volumes"][0] in spec["volumes"]

    assert spec["securityContext"] == deployed["securityContext"]
    assert container["securityContext"] == serve["securityContext"]
    assert spec["automountServiceAccountToken"] is False
    name = pod["metadata"]["name"]
    assert f"delete pod {name} " in calls, "also where it failed"


def test_with_a_bucket_the_pod_has_its_credentials_and_no_volume(run_verb):
    case = "components/store-bucket on local"
    _, _, pod = run_verb("rollback", case=case)
    kubernetes_validate.validate(pod, "1.30", strict=True)
    (container,) = pod["spec"]["containers"]
    (serve,) = read_deployment(case)["spec"]["template"]["spec"]["containers"]
    assert {"secretRef": {"name": "imago-bucket", "optional": True}} in container["envFrom"]
    assert container["envFrom"] == serve["envFrom"]
    assert [volume["name"] for volume in pod["spec"]["volumes"]] == ["tmp"]
    assert pod["metadata"]["labels"]["store"] == "bucket", "for the network policy"


def test_what_the_pod_says_is_the_error(run_verb):
    log = "error: /store: digits has no version 9; it has 1"
    result, calls, _ = run_verb("promote", phase="Failed", log=log, VERSION="9")
    assert error_line(result) == "make: /store: digits has no version 9; it has 1\n"
    assert "delete pod imago-models-" in calls


def test_promote_needs_a_version():
    error = error_line(run_cluster_script("promote", VERSION="newest"))
    assert "VERSION is not a number; example: make promote VERSION=3" in error


def test_without_a_deployment_there_is_no_store(cluster):
    result, _ = cluster("rollback", {})
    assert "no Deployment imago-serving in the namespace 'imago'" in error_line(result)


@pytest.mark.parametrize("words", [["OVERLAY=local"], []], ids=["of a cluster", "here"])
def test_make_models_lists_the_cluster_only_with_an_overlay(words):
    result = subprocess.run(
        ["make", "-n", "models", *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ("k8s/cluster models" in result.stdout) is bool(words)
    assert ("models list --store" in result.stdout) is not bool(words)
