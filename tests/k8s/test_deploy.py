"""`make deploy` on a cluster that runs Imago already: what it replaces, keeps and deletes."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from support.fake_kubectl import RunCluster, admission_errors, error_line, needs_kubectl
from support.manifests import CASES, overlay_with_components, render

JOB = (
    '"imago-train" is invalid: spec.template: '
    "Invalid value: core.PodTemplateSpec{}: field is immutable"
)


@needs_kubectl
@pytest.mark.parametrize(
    "job", ["The Job", "Error from server (Invalid): Job.batch"]
)  # kubectl prints both forms
def test_a_job_whose_settings_differ_is_replaced(job, cluster):
    result, calls = cluster("deploy", admission_errors(f"{job} {JOB}"))
    error_line(result)
    assert "-n imago delete job imago-train --cascade=foreground" in calls
    assert "\napply -f -" in calls


@needs_kubectl
def test_a_bulk_prediction_whose_settings_differ_is_replaced_alone(cluster, tmp_path):
    """Finished shards are skipped, so nothing is lost."""
    refusal = JOB.replace("imago-train", "imago-predict")
    answers = {
        "--dry-run": admission_errors(f"The Job {refusal}")["--dry-run"],
        '"Complete"': "echo 'imago-train True- 0'",
    }
    with overlay_with_components("store-bucket", "bulk-predict") as name:
        result, calls = cluster("deploy", answers, OVERLAY=name)
    assert result.returncode == 0, result.stderr
    assert "Training: completed, unchanged" in result.stdout
    (deleted,) = (line for line in calls.splitlines() if " delete " in line)
    assert "delete job imago-predict --cascade=foreground" in deleted


@needs_kubectl
def test_a_failed_job_is_replaced_even_without_changes(cluster, tmp_path):
    failed = f"[ -e {tmp_path}/deleted ] || echo 'the backoff limit is reached'"
    result, calls = cluster(
        "deploy",
        {"get job imago-train": failed, "delete job imago-train": f"touch {tmp_path}/deleted"},
    )
    assert result.returncode == 0, result.stderr
    assert calls.index("delete job imago-train --cascade=foreground") < calls.index("\napply -f -")
    assert "Serving." in result.stdout


@needs_kubectl
def test_an_unchanged_job_is_kept(cluster):
    result, calls = cluster("deploy", {})
    assert result.returncode == 0, result.stderr
    assert "delete" not in calls


@needs_kubectl
@pytest.mark.parametrize("differs", [True, False])
def test_a_deploy_prints_only_what_it_changes(differs, cluster):
    """kubectl calls a disruption budget configured even where it sends the same again."""
    applied = ("service/imago-serving unchanged", "poddisruptionbudget.policy/imago configured")
    answers = {
        "apply -f -": shlex.join(["printf", r"%s\n", *applied]),
        "diff -f -": f"exit {int(differs)}",
    }
    result, _ = cluster("deploy", answers)
    assert result.returncode == 0, result.stderr
    assert applied[0] not in result.stdout
    assert (applied[1] in result.stdout) is differs
    unchanged = "Unchanged: the cluster has the overlay 'local' as it is.\n"
    assert (unchanged in result.stdout) is not differs


@needs_kubectl
@pytest.mark.parametrize("exists", [True, False])
def test_a_key_is_made_for_a_service_that_is_reachable_from_outside(cluster, tmp_path, exists):
    answers = {
        "get secret imago-api-key": ":" if exists else "exit 1",
        "create secret": f"cat >{tmp_path}/key",
    }
    with overlay_with_components("ingress") as overlay:
        result, calls = cluster("deploy", answers, OVERLAY=overlay)
    assert result.returncode == 0, result.stderr
    if exists:
        assert "create secret" not in calls
    else:
        assert "create secret generic imago-api-key --from-file=key=/dev/stdin" in calls
        key = (tmp_path / "key").read_text().strip()
        assert len(key) == 32
        assert key not in calls + result.stdout
        assert "get secret imago-api-key" in result.stdout


@needs_kubectl
def test_no_key_is_made_for_a_service_without_one(cluster):
    _, calls = cluster("deploy", {})
    assert "secret" not in calls


LAST_APPLIED = """
apiVersion: apps/v1
kind: Deployment
metadata:
  name: imago-serving
spec:
  replicas: 2
  revisionHistoryLimit: 5"""


def deployed(
    cluster: RunCluster,
    tmp_path: Path,
    live: int | None,
    overlay: str,
    rollout: int | None = None,
) -> tuple[list[int | None], str]:
    """Deploy over a Deployment with `live` replicas, and a Rollout with `rollout`; None: no object.

    Return the replicas of each applied Deployment and Rollout, and the last applied manifest.
    """
    answers = {
        "get deployment imago-serving": ":" if live is None else f"echo {live}",
        # Without Argo Rollouts kubectl fails.
        "get rollout imago-serving": "exit 1" if rollout is None else f"echo {rollout}",
        "view-last-applied": f"echo {shlex.quote(LAST_APPLIED)}",
        "set-last-applied": f"cat >{tmp_path}/before",
        "apply -f -": f"cat >{tmp_path}/applied",
    }
    result, _ = cluster("deploy", answers, OVERLAY=overlay)
    assert result.returncode == 0, result.stderr

    replicas: list[int | None] = []
    for manifest in yaml.safe_load_all((tmp_path / "applied").read_text()):
        if manifest["kind"] in ("Deployment", "Rollout"):
            replicas.append(manifest["spec"].get("replicas"))
    before = tmp_path / "before"
    return replicas, before.read_text() if before.exists() else LAST_APPLIED


@needs_kubectl
@pytest.mark.parametrize(
    "overlay", ["local", "cpu"], ids=["scaled by hand", "under an autoscaler that is new"]
)
def test_a_deploy_keeps_the_current_replicas(overlay, cluster, tmp_path):
    replicas, before = deployed(cluster, tmp_path, live=5, overlay=overlay)
    assert replicas == [None]
    assert "replicas" not in before, "apply would remove the field, and the API server set it to 1"
    assert yaml.safe_load(before)["spec"] == {"revisionHistoryLimit": 5}


@needs_kubectl
def test_a_deploy_starts_a_service_that_was_scaled_to_zero(cluster, tmp_path):
    assert deployed(cluster, tmp_path, live=0, overlay="local") == ([2], LAST_APPLIED)


@needs_kubectl
def test_a_deploy_takes_the_replicas_of_a_canary_from_the_overlay(cluster, tmp_path):
    with overlay_with_components("canary-plain") as name:
        assert deployed(cluster, tmp_path, live=5, overlay=name)[0] == [None, 1]


@needs_kubectl
@pytest.mark.parametrize(
    ("components", "live", "rollout", "applied"),
    [
        (["canary-rollout"], 8, None, [None, 8]),
        (["hpa", "canary-rollout"], 8, None, [None, 8]),
        (["canary-rollout"], None, None, [None, None]),
        ([], 0, 8, [8]),
    ],
    ids=["taken over", "taken over, with its autoscaler", "new", "given back"],
)
def test_a_rollout_takes_the_replicas_over_and_gives_them_back(
    components, live, rollout, applied, cluster, tmp_path
):
    """Without replicas a Rollout would get 1, and it scales the Deployment to 0."""
    with overlay_with_components(*components) as name:
        assert deployed(cluster, tmp_path, live, name, rollout)[0] == applied


@needs_kubectl
def test_a_deploy_keeps_the_replicas_of_a_rollout(cluster, tmp_path):
    with overlay_with_components("canary-rollout") as name:
        replicas, before = deployed(cluster, tmp_path, 0, name, rollout=8)
    assert replicas == [None, None]
    assert "replicas" not in before


@needs_kubectl
def test_a_deploy_starts_a_service_that_an_autoscaler_leaves_at_zero(cluster, tmp_path):
    with overlay_with_components("keda") as name:
        assert deployed(cluster, tmp_path, live=0, overlay=name)[0] == [1]


@needs_kubectl
@pytest.mark.parametrize(
    ("status", "replaced"),
    [(0, False), (1, True), (2, False)],
    ids=["unchanged", "changed", "diff fails"],
)
def test_a_train_job_is_replaced_where_it_or_its_runtime_differs(
    status, replaced, cluster, tmp_path
):
    with overlay_with_components("training-kubeflow") as name:
        answers = {
            "diff -l": f"cat >{tmp_path}/diffed; exit {status}",
            '"Complete"': "echo 'imago-train True- 0'",
        }
        result, calls = cluster("deploy", answers, OVERLAY=name)
    assert result.returncode == 0, result.stderr
    deletion = "-n imago delete trainjob imago-train --cascade=foreground --ignore-not-found\n"
    assert (deletion in calls) is replaced
    (line,) = (line for line in calls.splitlines() if line.startswith("diff -l"))
    label = line.split()[2]
    diffed = yaml.safe_load_all((tmp_path / "diffed").read_text())
    diffed_kinds = {m["kind"] for m in diffed if label in m["metadata"].get("labels", {})}
    assert diffed_kinds == {"TrainJob", "TrainingRuntime"}


@needs_kubectl
def test_a_first_train_job_starts(cluster):
    """It differs from the cluster, which has none."""
    with overlay_with_components("training-kubeflow") as name:
        result, calls = cluster("deploy", {"diff -l": "exit 1"}, OVERLAY=name)
    assert "Training: starts\n" in result.stdout
    assert "delete" not in calls


@needs_kubectl
def test_a_train_job_that_failed_is_replaced(cluster, tmp_path):
    with overlay_with_components("training-kubeflow") as name:
        result, calls = cluster(
            "deploy",
            {
                "get trainjob imago-train": f"[ -e {tmp_path}/deleted ] || echo 'jobset failed'",
                "delete trainjob imago-train": f"touch {tmp_path}/deleted",
            },
            OVERLAY=name,
        )
    assert result.returncode == 0, result.stderr
    assert calls.index("delete trainjob imago-train") < calls.index("\napply -f -")


@needs_kubectl
def test_a_train_job_that_can_not_be_changed_is_replaced(cluster):
    with overlay_with_components("training-kubeflow") as name:
        _, calls = cluster(
            "deploy",
            admission_errors('The TrainJob.trainer.kubeflow.org "imago-train" is invalid: spec'),
            OVERLAY=name,
        )
    assert "delete trainjob imago-train" in calls
    assert "\napply -f -" in calls


LIVE = (
    "Deployment/imago-serving",
    "Deployment/imago-serving-canary",
    "HorizontalPodAutoscaler/imago-serving",
    "ConfigMap/imago-serving-0123456789",
    "ConfigMap/imago-training-0123456789",
    "ConfigMap/imago-dashboard",
)


@needs_kubectl
@pytest.mark.parametrize("verb", ["deploy", "undeploy"])
def test_objects_of_another_overlay_are_listed_with_the_command_to_delete_them(verb, cluster):
    """With undeploy older settings, too, which a deploy keeps for a rollback."""
    result, calls = cluster(
        verb,
        {
            "api-resources": "printf '%s\\n' deployments.apps pods configmaps",
            "get deployments.apps,configmaps -l": shlex.join(["printf", r"%s\n", *LIVE]),
        },
    )
    assert result.returncode == 0, result.stderr
    named = [LIVE[1], LIVE[2], LIVE[5]] if verb == "deploy" else LIVE[1:]
    assert result.stdout.count(f"kubectl -n imago delete {' '.join(named)}\n") == 1
    assert "-n imago delete" not in calls, "only a person deletes them"


@needs_kubectl
@pytest.mark.parametrize(("overlay", "is_named"), [("local", True), ("cpu", False)])
def test_purge_names_the_files_that_stay_on_the_node(overlay, is_named, cluster):
    result, _ = cluster("undeploy", {}, OVERLAY=overlay, PURGE="1")
    assert result.returncode == 0, result.stderr
    assert ("run there: rm -r /var/tmp/imago" in result.stdout) is is_named


def volumes(*lines: str) -> dict[str, str]:
    """Return the answer of a cluster with these volumes: name, namespace of the claim, phase."""
    return {"get persistentvolumes": shlex.join(["printf", r"%s\n", *lines])}


@needs_kubectl
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("imago-store other Bound", "the namespace 'other' holds the volume imago-store"),
        ("imago-data imago Released", "kubectl delete persistentvolume imago-data"),
    ],
)
def test_a_volume_that_can_not_be_claimed_is_one_line(line, words, cluster):
    result, calls = cluster("deploy", volumes("imago-data  Available", line))
    assert words in error_line(result)
    assert "nothing was changed" in result.stderr
    assert "apply" not in calls


@needs_kubectl
def test_purge_keeps_the_volumes_of_another_namespace(cluster, tmp_path):
    """Deleting one that is bound would wait for ever, and mark it as ending."""
    answers = volumes("imago-data imago Bound", "imago-store other Bound")
    answers["delete --ignore-not-found"] = f"cat >{tmp_path}/deleted"
    result, _ = cluster("undeploy", answers, PURGE="1")
    assert result.returncode == 0, result.stderr
    assert "Volumes that another namespace holds are kept: imago-store\n" in result.stdout

    deleted = list(yaml.safe_load_all((tmp_path / "deleted").read_text()))
    names = [m["metadata"]["name"] for m in deleted if m["kind"] == "PersistentVolume"]
    assert names == ["imago-data"]
    assert len(deleted) == len(render("overlays/local")) - 1


@needs_kubectl
def test_without_such_objects_nothing_is_printed(cluster):
    result, _ = cluster(
        "deploy",
        {
            "api-resources": "echo deployments.apps",
            "get deployments.apps -l": "echo Deployment/imago-serving",
        },
    )
    assert result.returncode == 0, result.stderr
    assert "still in the cluster" not in result.stdout


def plural(kind: str) -> str:
    kind = re.sub("y$", "ie", kind)
    return f"{kind}es" if kind.endswith("s") else f"{kind}s"


@pytest.mark.slow
@needs_kubectl
def test_every_kind_in_the_manifests_can_be_listed(cluster):
    kept = {"Namespace", "PersistentVolume", "PersistentVolumeClaim"}
    names: set[str] = set()
    for case in CASES:
        for manifest in render(case):
            group = manifest["apiVersion"].rpartition("/")[0]
            if manifest["kind"] not in kept:
                names.add(f"{plural(manifest['kind'].lower())}.{group}".rstrip("."))
    _, calls = cluster(
        "deploy", {"api-resources": shlex.join(["printf", r"%s\n", *names, "secrets", "pods"])}
    )
    (listed,) = re.findall(r"get (\S+) -l app.kubernetes.io/name=imago -o go-template", calls)
    assert set(listed.split(",")) == names


@needs_kubectl
def test_nothing_is_changed_where_a_volume_can_not_be_changed(cluster):
    result, calls = cluster(
        "deploy",
        admission_errors(
            'The PersistentVolumeClaim "imago-store" is invalid: spec: Forbidden: immutable',
            f"The Job {JOB}",
        ),
    )
    assert result.returncode == 2
    assert "make: nothing was changed" in result.stderr.splitlines()[-1]
    assert 'PersistentVolumeClaim "imago-store" is invalid' in result.stderr
    assert "delete" not in calls
    assert "\napply -f -" not in calls


SETTINGS = (
    "imago-serving-aaaaaaaaaa",
    "imago-serving-bbbbbbbbbb",
    "imago-training-cccccccccc",
    "imago-dashboard",
)
MADE = shlex.join(["printf", r"configmap/%s\n", *SETTINGS])


@needs_kubectl
def test_unused_settings_are_deleted(cluster):
    """Older ReplicaSets, Jobs and pods would not start without theirs."""
    result, calls = cluster(
        "deploy", {"get configmaps -l": MADE, "get replicasets": f"echo 'name: {SETTINGS[0]}'"}
    )
    assert result.returncode == 0, result.stderr
    (deleted,) = (line for line in calls.splitlines() if " delete " in line)
    assert deleted == f"-n imago delete configmaps {SETTINGS[1]} {SETTINGS[2]} --ignore-not-found"
    assert calls.index("\napply -f -") < calls.index(" delete "), (
        "objects may refer to them until apply has changed them"
    )
    assert "replicasets,deployments,jobs,cronjobs,pods -o yaml" in calls


@needs_kubectl
def test_applied_settings_are_kept(cluster):
    applied = [m["metadata"]["name"] for m in render("overlays/local") if m["kind"] == "ConfigMap"]
    _, calls = cluster(
        "deploy", {"get configmaps -l": shlex.join(["printf", r"configmap/%s\n", *applied])}
    )
    assert len(applied) == 2
    assert " delete " not in calls


@needs_kubectl
def test_no_settings_are_deleted_where_their_users_are_unknown(cluster):
    _, calls = cluster("deploy", {"get configmaps -l": MADE, "get replicasets": "exit 1"})
    assert " delete " not in calls
