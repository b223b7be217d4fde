"""What `make deploy` does with a training that is there: a new image alone is no reason to train anew."""

import shlex

import pytest
import yaml
from support.fake_kubectl import admission_errors, error_line, needs_kubectl
from support.manifests import K8S, Manifest, overlay_with_components, temporary_overlay

OLD = "registry.example.com/imago-train:old"
FAILED = '"Failed"'
IMMUTABLE = 'The Job "imago-train" is invalid: spec.template: Invalid value: core.PodTemplateSpec{}: field is immutable'


def there(state: str) -> dict[str, str]:
    """A Job or TrainJob, as k8s/cluster asks for it: its name, whether it is complete, how many pods are ready."""
    return {
        '"Complete"': f"echo {shlex.quote(f'imago-train {state}')}",
        "containers[0].image": f"echo {OLD}",
    }


DONE, RUNNING, NEW, WAITING = "True- 0", "- 1", "- ", "- 0"


@pytest.fixture
def deploy(cluster, tmp_path):
    """Deploys TAG=new there; returns also what the cluster was asked, and what was applied."""

    def run(answers: dict[str, str], **env: str) -> tuple:
        done, asked = cluster(
            "deploy", {"apply -f -": f"cat >{tmp_path}/applied"} | answers, TAG="new", **env
        )
        applied = tmp_path / "applied"
        return (
            done,
            asked,
            list(yaml.safe_load_all(applied.read_text())) if applied.exists() else [],
        )

    return run


def image(manifests: list[Manifest], kind: str) -> str:
    (found,) = (m["spec"]["template"]["spec"] for m in manifests if m["kind"] == kind)
    if kind == "TrainingRuntime":
        found = found["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    return found["containers"][0]["image"]


def said(done) -> str:
    """The one line about training."""
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("Training: "))
    return line


@needs_kubectl
@pytest.mark.parametrize(
    ("state", "what"), [(DONE, "has ended well"), (RUNNING, "runs"), (NEW, "runs")]
)
def test_a_new_tag_rolls_serving_and_leaves_training(state, what, deploy):
    done, asked, applied = deploy(there(state))
    assert what in said(done)
    assert said(done).endswith("to train anew: make deploy OVERLAY=local TAG=new TRAIN=1"), (
        "the same tag"
    )
    assert "delete" not in asked
    assert image(applied, "Job") == OLD, "another image is what the cluster refuses"
    assert image(applied, "Deployment") == "localhost/imago-serve:new"


@needs_kubectl
def test_a_training_that_has_not_begun_takes_the_new_image(deploy):
    """The old one may be what it waits for."""
    done, asked, applied = deploy(
        there(WAITING) | {"--dry-run": admission_errors(IMMUTABLE)["--dry-run"]}
    )
    assert "had not begun" in said(done)
    assert "delete job imago-train --cascade=foreground" in asked
    assert image(applied, "Job") == "localhost/imago-train:new"


@needs_kubectl
@pytest.mark.parametrize(
    ("state", "answers", "env", "why"),
    [
        (
            DONE,
            {"--dry-run": admission_errors(IMMUTABLE)["--dry-run"]},
            {},
            "anew, as its settings differ",
        ),
        (DONE, {}, {"TRAIN": "1"}, "anew, as TRAIN asks"),
        (RUNNING, {}, {"TRAIN": "1"}, "anew, as TRAIN asks"),
        (WAITING, {FAILED: "echo 'exit code 2'"}, {}, "anew, as it failed: exit code 2"),
    ],
    ids=["other settings", "asked", "asked while it runs", "failed"],
)
def test_training_is_replaced_and_the_reason_said(state, answers, env, why, deploy, tmp_path):
    gone = {"delete job": f"touch {tmp_path}/gone"}
    answers = {asked: f"[ -e {tmp_path}/gone ] || {does}" for asked, does in answers.items()}
    done, asked, applied = deploy(answers | gone | there(state), **env)
    assert why in said(done)
    assert asked.index("delete job imago-train --cascade=foreground") < asked.index("\napply -f -")
    if "--dry-run" not in answers:
        assert image(applied, "Job") == "localhost/imago-train:new"


@needs_kubectl
def test_a_training_that_runs_is_not_ended_unasked(deploy):
    done, asked, applied = deploy(
        there(RUNNING) | {"--dry-run": admission_errors(IMMUTABLE)["--dry-run"]}
    )
    assert (
        "nothing was changed: training runs, and by other settings than 'local' says"
        in error_line(done)
    )
    assert "make deploy OVERLAY=local TAG=new TRAIN=1" in done.stderr
    assert "delete" not in asked
    assert applied == []


@needs_kubectl
def test_a_job_of_ones_own_keeps_its_image(deploy):
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
        _, _, applied = deploy(there(DONE), OVERLAY=name)
    jobs = {m["metadata"]["name"]: image([m], "Job") for m in applied if m["kind"] == "Job"}
    assert jobs == {"fetch": "example.com/fetch:1", "imago-train": OLD}


@needs_kubectl
def test_where_there_is_none_training_begins(deploy):
    done, asked, applied = deploy({})
    assert said(done) == "Training: begins"
    assert "delete" not in asked
    assert image(applied, "Job") == "localhost/imago-train:new"


@needs_kubectl
@pytest.mark.parametrize("state", [DONE, RUNNING])
def test_a_new_tag_leaves_a_train_job_too(state, deploy, tmp_path):
    """Its image is its runtime's: Kubeflow takes another, and `make deploy` looks whether it differs."""
    with overlay_with_components("training-kubeflow") as name:
        done, asked, applied = deploy(
            there(state) | {"diff -l": f"cat >{tmp_path}/looked"}, OVERLAY=name
        )
    said(done)
    assert "delete" not in asked
    assert image(applied, "TrainingRuntime") == OLD
    assert (
        image(list(yaml.safe_load_all((tmp_path / "looked").read_text())), "TrainingRuntime") == OLD
    )


@needs_kubectl
def test_a_training_that_waits_for_its_hour_takes_the_new_image_then(deploy):
    with overlay_with_components("cron-training") as name:
        done, asked, applied = deploy(there(DONE), OVERLAY=name, TRAIN="1")
    assert done.returncode == 0, done.stderr
    assert "Training waits for its hour" in done.stdout
    assert "delete" not in asked, "the Job of the overlay before: it is named, for a person to end"
    (cron,) = (m for m in applied if m["kind"] == "CronJob")
    assert (
        image([cron["spec"]["jobTemplate"] | {"kind": "Job"}], "Job") == "localhost/imago-train:new"
    )
