"""Policies for pods: restricted profile, probes, resources, fixed tags, safe updates."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from support.manifests import (
    CASES,
    K8S,
    Manifest,
    containers,
    manifests_of_kind,
    pod_templates,
    render,
)

# Volumes that the restricted profile allows.
VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
# Exit statuses, by container, after which another pod would end in the same way.
FINAL_STATUSES = {"train": [2, 3], "node": [2, 3], "predict": [2]}
CHECKOV = Path(os.environ.get("CHECKOV", K8S.parent / ".venv/checkov/bin/checkov"))


def all_pods(case: str) -> list[tuple[str, Manifest]]:
    """Return (kind/name, pod template) of serving and training; none may be missing."""
    training = "Job"
    if "kubeflow" in case:
        training = "TrainingRuntime"
    elif "cron" in case:
        training = "CronJob"

    templates = pod_templates(case)
    assert {name.split("/")[0] for name, _ in templates} == {"Deployment", training}
    return templates


@pytest.mark.parametrize("case", CASES)
def test_pods_meet_the_restricted_profile(case):
    for name, template in all_pods(case):
        spec = template["spec"]
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True, name
        assert context["runAsUser"] >= 10000, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        for volume in spec["volumes"]:
            assert set(volume) - {"name"} <= VOLUMES, name
        for container in containers(template):
            security_context = container["securityContext"]
            assert security_context["allowPrivilegeEscalation"] is False, name
            assert security_context["readOnlyRootFilesystem"] is True, name
            assert security_context["capabilities"] == {"drop": ["ALL"]}, name
            assert "privileged" not in security_context, name
            assert not any("hostPort" in port for port in container.get("ports", [])), name


@pytest.mark.parametrize("case", CASES)
def test_the_namespace_enforces_the_restricted_profile(case):
    (namespace,) = manifests_of_kind(case, "Namespace")
    for mode in ("enforce", "warn", "audit"):
        assert namespace["metadata"]["labels"][f"pod-security.kubernetes.io/{mode}"] == "restricted"


@pytest.mark.parametrize("case", CASES)
def test_pods_have_no_token(case):
    for name, template in all_pods(case):
        assert template["spec"]["automountServiceAccountToken"] is False, name
        assert template["spec"]["serviceAccountName"] != "default", name
    for account in manifests_of_kind(case, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    assert not manifests_of_kind(case, "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")


@pytest.mark.parametrize("case", CASES)
def test_containers_have_resources_and_fixed_image_tags(case):
    for name, template in all_pods(case):
        for container in containers(template):
            resources = container["resources"]
            for part in ("requests", "limits"):
                assert {"cpu", "memory"} <= set(resources[part]), name
            assert re.fullmatch(r"[\w.-]+/[\w./-]+:[\w.-]+", container["image"]), container["image"]
            assert not container["image"].endswith(":latest"), name


@pytest.mark.parametrize("case", CASES)
def test_serving_updates_probes_and_drains(case):
    for deployment in manifests_of_kind(case, "Deployment"):
        spec = deployment["spec"]
        assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
        pod = spec["template"]["spec"]
        assert len(pod["topologySpreadConstraints"]) == 2
        (serve,) = pod["containers"]
        assert serve["startupProbe"]["httpGet"]["path"] == "/health/live"
        assert serve["livenessProbe"]["httpGet"]["path"] == "/health/live"
        assert serve["readinessProbe"]["httpGet"]["path"] == "/health/ready"
        (settings,) = (
            config_map["data"]
            for config_map in manifests_of_kind(case, "ConfigMap")
            if "IMAGO_DRAIN_SECONDS" in config_map["data"]
        )
        drain_seconds = float(settings["IMAGO_DRAIN_SECONDS"])
        pre_stop_seconds = serve["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert pod["terminationGracePeriodSeconds"] > pre_stop_seconds + drain_seconds
        cpu = serve["resources"]["limits"]["cpu"]
        assert cpu.isdecimal(), "threads follow the limit, so it is a whole number of cores"


def training_jobs(case: str) -> list[Manifest]:
    """Return the spec of each Job, also of those that a CronJob or a TrainingRuntime creates."""
    jobs = [job["spec"] for job in manifests_of_kind(case, "Job")]
    for cron_job in manifests_of_kind(case, "CronJob"):
        jobs.append(cron_job["spec"]["jobTemplate"]["spec"])
    for runtime in manifests_of_kind(case, "TrainingRuntime"):
        for job in runtime["spec"]["template"]["spec"]["replicatedJobs"]:
            jobs.append(job["template"]["spec"])
    return jobs


@pytest.mark.parametrize("case", CASES)
def test_training_restarts_after_disruptions_and_not_after_invalid_settings(case):
    for job in training_jobs(case):
        (train,) = containers(job["template"])
        rules: list[Manifest] = []
        for action, statuses in (("FailJob", FINAL_STATUSES[train["name"]]), ("Ignore", [143])):
            exit_codes = {"containerName": train["name"], "operator": "In", "values": statuses}
            rules.append({"action": action, "onExitCodes": exit_codes})
        disruption = {"type": "DisruptionTarget", "status": "True"}
        rules.append({"action": "Ignore", "onPodConditions": [disruption]})

        assert job["podFailurePolicy"]["rules"] == rules
        assert job["template"]["spec"]["restartPolicy"] == "Never"
        assert job["ttlSecondsAfterFinished"] > 0
        assert job["podReplacementPolicy"] == "Failed"


@pytest.mark.parametrize("case", CASES)
def test_a_changed_setting_makes_a_new_config_map(case):
    """Then it is rolled out and back with its pods. Only the dashboard keeps its name."""
    settings = [
        m
        for m in manifests_of_kind(case, "ConfigMap")
        if m["metadata"]["name"] != "imago-dashboard"
    ]
    assert len(settings) == (3 if "bulk-predict" in case else 2)
    for manifest in settings:
        assert re.fullmatch(
            r"imago-(serving|training|predict)-[a-z0-9]{10}", manifest["metadata"]["name"]
        )
        assert manifest["immutable"] is True, manifest["metadata"]["name"]


@pytest.mark.parametrize("case", CASES)
def test_objects_have_the_recommended_labels(case):
    for manifest in render(case):
        labels = manifest["metadata"].get("labels", {})
        if manifest["kind"] not in ("Namespace", "ConfigMap"):
            assert labels["app.kubernetes.io/name"] == "imago", manifest["kind"]
        assert labels.get("app.kubernetes.io/part-of") == "imago" or case.startswith(
            "components/"
        ), manifest["kind"]


def test_checkov_finds_nothing(tmp_path):
    if not CHECKOV.exists():
        pytest.skip(f"{CHECKOV} is not installed; run make checkov, or set CHECKOV")
    # Most cases render most manifests alike: each is checked once.
    distinct = {json.dumps(manifest): manifest for case in CASES for manifest in render(case)}
    for number, manifest in enumerate(distinct.values()):
        (tmp_path / f"{number}.yaml").write_text(json.dumps(manifest))  # JSON is YAML
    result = subprocess.run(
        [CHECKOV, "--config-file", K8S / ".checkov.yaml", "-d", tmp_path],
        capture_output=True,
        text=True,
    )
    problems = re.findall(r"Check: (.*)\n\s*FAILED for resource: (.*)", result.stdout)
    assert problems == []
    assert result.returncode == 0
    checked = int(re.search(r"Passed checks: (\d+)", result.stdout)[1])
    assert checked > 10 * len(distinct)
