"""`make deploy` with an existing training job: a new image alone does not restart it."""

import re
import shlex
import subprocess
import textwrap

import pytest
import yaml

from support.fake_kubectl import admission_errors, error_line, needs_kubectl
from support.manifests import (
    K8S,
    Manifest,
    containers,
    overlay_with_components,
    render_overlay,
    temporary_overlay,
)
from train.cli.recipes import default_model_name
from train.data.sources.several import split_sources

OLD = "registry.example.com/imago-train:old"
FAILED = '"Failed"'
IMMUTABLE = (
    'The Job "imago-train" is invalid: spec.template: '
    "Invalid value: core.PodTemplateSpec{}: field is immutable"
)
# A dry run of the manifests, where the job's settings differ.
REFUSED = {"--dry-run": admission_errors(IMMUTABLE)["--dry-run"]}


def existing_job(state: str) -> dict[str, str]:
    """Return what kubectl answers about a job: its name, whether it completed, ready pods."""
    return {
        '"Complete"': f"echo {shlex.quote(f'imago-train {state}')}",
        "containers[0].image": f"echo {OLD}",
    }


# Whether the job completed, and its ready pods.
COMPLETED = "True- 0"
RUNNING = "- 1"
NEW = "- "
WAITING = "- 0"


@pytest.fixture
def deploy(cluster, tmp_path):
    """Deploy TAG=new. Return the result, the calls of kubectl and the applied manifests."""

    def run(answers: dict[str, str], **env: str) -> tuple:
        applied = tmp_path / "applied"
        answers = {"apply -f -": f"cat >{applied}"} | answers
        result, calls = cluster("deploy", answers, TAG="new", **env)
        text = applied.read_text() if applied.exists() else ""
        return result, calls, list(yaml.safe_load_all(text))

    return run


def image(manifests: list[Manifest], kind: str) -> str:
    """Return the image of the first container of the only object of this kind."""
    (spec,) = (m["spec"]["template"]["spec"] for m in manifests if m["kind"] == kind)
    if kind == "TrainingRuntime":
        spec = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    return spec["containers"][0]["image"]


def training_line(result: subprocess.CompletedProcess[str]) -> str:
    """Return the line about training."""
    assert result.returncode == 0, result.stdout + result.stderr
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("Training: "))
    return line


@needs_kubectl
@pytest.mark.parametrize(
    ("state", "what"), [(COMPLETED, "completed"), (RUNNING, "runs"), (NEW, "runs")]
)
def test_a_new_tag_updates_serving_and_not_training(state, what, deploy):
    result, calls, applied = deploy(existing_job(state))
    assert what in training_line(result)
    assert training_line(result).endswith(
        "to train again: make deploy OVERLAY=local TAG=new TRAIN=1"
    ), "the same tag"
    assert "delete" not in calls
    assert image(applied, "Job") == OLD, "the cluster refuses another image"
    assert image(applied, "Deployment") == "localhost/imago-serve:new"


@needs_kubectl
def test_a_job_that_has_not_started_gets_the_new_image(deploy):
    """The old image may be what it waits for."""
    result, calls, applied = deploy(existing_job(WAITING) | REFUSED)
    assert "has not started" in training_line(result)
    assert "delete job imago-train --cascade=foreground" in calls
    assert image(applied, "Job") == "localhost/imago-train:new"


@needs_kubectl
@pytest.mark.parametrize(
    ("state", "answers", "env", "why"),
    [
        (
            COMPLETED,
            REFUSED,
            {},
            "restarts, because its settings differ",
        ),
        (COMPLETED, {}, {"TRAIN": "1"}, "restarts, because TRAIN=1 is set"),
        (RUNNING, {}, {"TRAIN": "1"}, "restarts, because TRAIN=1 is set"),
        (WAITING, {FAILED: "echo 'exit code 2'"}, {}, "restarts, because it failed: exit code 2"),
    ],
    ids=["other settings", "TRAIN=1", "TRAIN=1 while it runs", "failed"],
)
def test_training_is_replaced_and_the_reason_printed(state, answers, env, why, deploy, tmp_path):
    gone = {"delete job": f"touch {tmp_path}/gone"}
    answers = {words: f"[ -e {tmp_path}/gone ] || {action}" for words, action in answers.items()}
    result, calls, applied = deploy(answers | gone | existing_job(state), **env)
    assert why in training_line(result)
    assert calls.index("delete job imago-train --cascade=foreground") < calls.index("\napply -f -")
    if "--dry-run" not in answers:
        assert image(applied, "Job") == "localhost/imago-train:new"


@needs_kubectl
def test_a_running_job_is_not_stopped_without_train_1(deploy):
    result, calls, applied = deploy(existing_job(RUNNING) | REFUSED)
    assert (
        "nothing was changed: training runs with other settings than the overlay 'local'"
        in error_line(result)
    )
    assert "make deploy OVERLAY=local TAG=new TRAIN=1" in result.stderr
    assert "delete" not in calls
    assert applied == []


@needs_kubectl
def test_a_job_of_the_user_keeps_its_image(deploy):
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "fetch"},
        "spec": {
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    "containers": [{"name": "fetch", "image": "example.com/fetch:1"}],
                }
            }
        },
    }
    with temporary_overlay(
        "{kind: Kustomization, namespace: imago, resources: [../local, fetch.yaml]}"
    ) as name:
        (K8S / "overlays" / name / "fetch.yaml").write_text(yaml.safe_dump(job))
        _, _, applied = deploy(existing_job(COMPLETED), OVERLAY=name)
    jobs = {m["metadata"]["name"]: image([m], "Job") for m in applied if m["kind"] == "Job"}
    assert jobs == {"fetch": "example.com/fetch:1", "imago-train": OLD}


@needs_kubectl
def test_without_a_job_training_starts(deploy):
    result, calls, applied = deploy({})
    assert training_line(result) == "Training: starts"
    assert "delete" not in calls
    assert image(applied, "Job") == "localhost/imago-train:new"


@needs_kubectl
@pytest.mark.parametrize("state", [COMPLETED, RUNNING])
def test_a_new_tag_does_not_restart_a_train_job(state, deploy, tmp_path):
    """Its image is in the runtime, which `make deploy` compares with the cluster."""
    with overlay_with_components("training-kubeflow") as name:
        result, calls, applied = deploy(
            existing_job(state) | {"diff -l": f"cat >{tmp_path}/diffed"}, OVERLAY=name
        )
    training_line(result)
    assert "delete" not in calls
    assert image(applied, "TrainingRuntime") == OLD
    assert (
        image(list(yaml.safe_load_all((tmp_path / "diffed").read_text())), "TrainingRuntime") == OLD
    )


@needs_kubectl
def test_a_cron_job_gets_the_new_image(deploy):
    with overlay_with_components("cron-training") as name:
        result, calls, applied = deploy(existing_job(COMPLETED), OVERLAY=name, TRAIN="1")
    assert result.returncode == 0, result.stderr
    assert "Training waits for its schedule" in result.stdout
    assert "delete" not in calls, "the Job of the earlier overlay is listed for a person to delete"
    (cron,) = (m for m in applied if m["kind"] == "CronJob")
    assert (
        image([cron["spec"]["jobTemplate"] | {"kind": "Job"}], "Job") == "localhost/imago-train:new"
    )


def test_the_overlay_of_the_loop_in_the_readme_trains_on_kept_images():
    """Training and serving name the same bucket; the CronJob trains within a budget."""
    text = (K8S / "README.md").read_text()
    (block,) = re.findall(
        r"^    # k8s/overlays/loop/kustomization.yaml\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL
    )
    manifests = render_overlay(textwrap.dedent(block))
    settings: dict[str, str] = {}
    for manifest in manifests:
        if manifest["kind"] == "ConfigMap":
            settings |= manifest["data"]
    kept = settings["IMAGO_KEEP"]
    assert kept.startswith("s3://")
    assert settings["DATA"].endswith(f",kept:{kept}")
    assert split_sources(settings["DATA"]) == ["s3://bucket/photos", f"kept:{kept}"]
    assert default_model_name(settings["DATA"]) == settings["IMAGO_MODEL"]

    assert not any(manifest["kind"] == "Job" for manifest in manifests)
    (cron,) = (manifest for manifest in manifests if manifest["kind"] == "CronJob")
    job = cron["spec"]["jobTemplate"]["spec"]
    (train,) = containers(job["template"])
    assert train["args"][-1] == "--time-budget=2h"
    (serving,) = (
        manifest
        for manifest in manifests
        if manifest["kind"] == "Deployment" and manifest["metadata"]["name"] == "imago-serving"
    )
    pod = serving["spec"]["template"]
    (serve,) = pod["spec"]["containers"]
    for container in (train, serve):
        credentials = [source.get("secretRef", {}).get("name") for source in container["envFrom"]]
        assert "imago-bucket" in credentials
    # /label needs the key, and the network policy lets only pods with this label reach the bucket.
    assert "IMAGO_API_KEY_FILE" in {variable["name"] for variable in serve["env"]}
    (policy,) = (m for m in manifests if m["metadata"]["name"] == "imago-bucket")
    selected = policy["spec"]["podSelector"]["matchLabels"]
    assert selected.items() <= pod["metadata"]["labels"].items()
