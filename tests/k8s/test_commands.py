"""Errors of k8s/cluster: one line that says what is wrong and what to do, exit status 2."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from support.fake_kubectl import (
    error_line,
    error_message,
    needs_kubectl,
    run_cluster_script,
)
from support.manifests import K8S, OVERLAYS, overlay_with_components, render


@pytest.fixture
def unreachable_cluster(tmp_path) -> dict[str, str]:
    """Return settings with which kubectl has a cluster that does not answer."""
    config = tmp_path / "config"
    config.write_text("""{apiVersion: v1, kind: Config, current-context: gone, users: [],
      clusters: [{name: gone, cluster: {server: "https://127.0.0.1:1"}}],
      contexts: [{name: gone, context: {cluster: gone, user: nobody}}]}""")
    return {"KUBECONFIG": str(config)}


@needs_kubectl
@pytest.mark.parametrize("verb", ["deploy", "undeploy"])
def test_an_unknown_overlay(verb):
    assert "no overlay 'moon'; choose one of: cpu gpu local" in error_line(
        run_cluster_script(verb, OVERLAY="moon")
    )


@needs_kubectl
@pytest.mark.parametrize("verb", ["deploy", "undeploy", "logs", "scale"])
def test_a_missing_cluster(verb, unreachable_cluster):
    assert "no cluster answers in kubectl's context 'gone'" in error_line(
        run_cluster_script(verb, N="2", **unreachable_cluster)
    )


@pytest.mark.parametrize("count", ["", "many", "-1"])
def test_scale_without_a_number(count):
    assert "make scale N=3" in error_line(run_cluster_script("scale", N=count))


@pytest.mark.parametrize("verb", ["deploy", "undeploy", "logs", "scale", "render"])
def test_no_kubectl(verb, tmp_path):
    for tool in ("bash", "dirname", "env", "sed"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    assert "kubectl is not installed" in error_line(
        run_cluster_script(verb, N="2", PATH=str(tmp_path))
    )


def test_the_script_works_with_the_tools_of_macos():
    """In bash 3.2 an empty array is unbound, and BSD's sed needs `;` before `}`."""
    script = (K8S / "cluster").read_text()
    assert not re.findall(r'(?<!\+)"\$\{\w+\[@\]\}"', script)
    assert not re.findall(r"\bsed .*[^;]}'", script)


@needs_kubectl
def test_registry_and_tag_are_set_in_the_images():
    result = run_cluster_script(
        "render", OVERLAY="gpu", REGISTRY="registry.example.com/team", TAG="7"
    )
    images = {line.split("image: ")[1] for line in result.stdout.splitlines() if " image: " in line}
    assert images == {
        "registry.example.com/team/imago-serve:7-cuda",
        "registry.example.com/team/imago-train:7",
    }


@needs_kubectl
def test_a_model_image_gets_the_registry_and_keeps_its_tag():
    with overlay_with_components("model-from-image") as name:
        result = run_cluster_script(
            "render", OVERLAY=name, REGISTRY="registry.example.com/team", TAG="7"
        )
    assert "reference: registry.example.com/team/imago-model:digits-1\n" in result.stdout


@needs_kubectl
def test_make_prints_the_error(unreachable_cluster):
    result = subprocess.run(
        ["make", "deploy", "OVERLAY=moon"], cwd=Path(K8S).parent, capture_output=True, text=True
    )
    assert result.returncode == 2
    error = "make: no overlay 'moon'; choose one of: cpu gpu local, or name a file of a release"
    assert result.stderr.splitlines()[0] == error


@pytest.mark.parametrize("verb", ["deploy", "undeploy", "logs", "scale", "promote", "rollback"])
def test_make_passes_the_given_variables_and_no_others(verb):
    def passed(**given: str) -> dict[str, str]:
        words = ["make", "-n", verb, *(f"{name}={value}" for name, value in given.items())]
        result = subprocess.run(words, cwd=K8S.parent, capture_output=True, text=True, check=True)
        *settings, script, passed_verb = shlex.split(result.stdout.replace("\\\n", ""))
        assert (script, passed_verb) == ("k8s/cluster", verb)
        return dict(setting.split("=", 1) for setting in settings)

    given = {
        "OVERLAY": "mine",
        "N": "3",
        "NAME": "photos",
        "VERSION": "3",
        "FORCE": "1",
        "TRAIN": "1",
        "WAIT_TRAIN": "1",
        "PURGE": "1",
        "FOLLOW": "1",
        "REGISTRY": "example.com/team",
        "TAG": "7",
        "PUBLISHED": "1",
        "DIGESTS": "digests",
    }
    assert passed(**given) == given
    assert passed() == dict.fromkeys(given, "") | {"OVERLAY": "local"}, (
        "without REGISTRY and TAG, the images are those of the manifests"
    )


IMAGE = "localhost/imago-serve:0.1.0"  # as in the manifests


def report(
    serve: str, model: str = "", image: str = IMAGE, pod: str = "imago-serving-x", hash: str = "new"
) -> str:
    """Return a pod's line as k8s/cluster queries it: the states of its two containers."""
    return f"{pod}\t{hash}\tmodel {image} {model}\tserve {image} {serve}\t\n"


def pods(*reports: str) -> dict[str, str]:
    """Return the answers of a cluster with these pods, whose newest ReplicaSet is `new`."""
    return {
        "rollout status": "exit 1",
        "get replicasets -l app.kubernetes.io/part-of": (
            "printf 'imago-serving 9 old\\nimago-serving 10 new\\n'"
        ),
        "get pods -l app.kubernetes.io/part-of": shlex.join(["printf", "%b", "".join(reports)]),
    }


@needs_kubectl
@pytest.mark.parametrize(
    "reason", ["ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName"]
)
def test_a_missing_image_is_one_line(reason, cluster):
    result, _ = cluster("deploy", pods(report(serve=reason)))
    assert f"the image {IMAGE} is not on the node" in error_line(result)
    assert "Serving." not in result.stdout


@needs_kubectl
@pytest.mark.parametrize(
    "pod",
    [
        report("ImagePullBackOff", image="localhost/imago-serve:wrong", hash="old"),
        report("CrashLoopBackOff", hash="old"),
        report("ImagePullBackOff", image="localhost/imago-train:wrong", hash=""),
    ],
    ids=["an old image", "an old crash", "an old training image"],
)
def test_pods_of_an_earlier_deploy_are_not_judged(pod, cluster):
    result, _ = cluster("deploy", pods(pod, report("PodInitializing")), WAIT="0")
    assert "not ready after 0 s" in error_line(result)


@needs_kubectl
def test_no_pod_is_judged_before_the_cluster_has_seen_the_change(cluster):
    """Until then the newest ReplicaSet is the old one."""
    generations = {"{.metadata.generation} {.status.observedGeneration}": "echo 3 2"}
    result, _ = cluster("deploy", generations | pods(report("CrashLoopBackOff")), WAIT="0")
    assert "not ready after 0 s" in error_line(result)


@needs_kubectl
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("killed", "killed"),
        (
            '{"time": "2026", "level": "error", "message": "model.onnx: \\"sha256\\" differs"}',
            r"model.onnx: \"sha256\" differs",
        ),
        ("", "its log is empty"),
    ],
    ids=["text", "JSON", "empty"],
)
def test_a_crash_loop_is_one_line_with_the_end_of_its_log(line, message, cluster):
    log = {"logs imago-serving-x -c serve --tail=1": shlex.join(["printf", "%s", line])}
    result, _ = cluster("deploy", pods(report("CrashLoopBackOff")) | log)
    assert error_line(result) == (
        f"make: imago-serving-x does not start: {message}; "
        "all of its log: kubectl -n imago logs imago-serving-x -c serve\n"
    )


MISSING = "/store has no digits/9; it has digits/1 digits/2"
WAITS_FOR_MODEL = pods(report("PodInitializing", model="2026-01-01T00:00:00Z")) | {
    "logs imago-serving-x -c model --tail=1": shlex.join(["echo", MISSING])
}


@needs_kubectl
def test_a_missing_version_is_one_line_once_training_has_completed(cluster):
    completed = {'"Complete"': "echo 'imago-train True- 0'"}
    result, _ = cluster("deploy", WAITS_FOR_MODEL | completed)
    assert error_line(result).startswith(f"make: {MISSING}; ")
    assert "IMAGO_VERSION" in result.stderr


@needs_kubectl
@pytest.mark.parametrize("state", ["- 0", "- 1", "-true "], ids=["waits", "runs", "suspended"])
def test_a_model_that_training_may_still_write_is_waited_for(state, cluster):
    training = {'"Complete"': shlex.join(["echo", f"imago-train {state}"])}
    result, _ = cluster("deploy", WAITS_FOR_MODEL | training, WAIT="0")
    error = error_line(result)
    assert error.startswith("make: not ready after 0 s; ")
    assert ("training waits in its queue" if "true" in state else MISSING) in error


@needs_kubectl
def test_a_training_failure_during_the_wait_is_one_line(cluster, tmp_path):
    result, _ = cluster(
        "deploy",
        {
            "rollout status": "exit 1",
            "apply -f -": f"touch {tmp_path}/applied",
            "get job imago-train": (
                f"[ ! -e {tmp_path}/applied ] || echo 'Container train exited with 2'"
            ),
        }
        | FAILED_POD,
    )
    assert error_line(result) == (
        "make: training failed: Container train exited with 2; the last line of its log: "
        "train: /data/photos: no such folder; all of it: make logs\n"
    )


FAILED_POD = {
    "--field-selector=status.phase=Failed": "printf 'pod/imago-train-a\\npod/imago-train-b\\n'",
    "logs pod/imago-train-b --tail=1": "echo 'train: /data/photos: no such folder'",
}


def training_after_apply(tmp_path: Path, state: str, failure: str = "") -> dict[str, str]:
    """Answers of a cluster in which deploy starts a training, which then has this state."""
    applied = f"[ ! -e {tmp_path}/applied ]"
    return {
        "apply -f -": f"touch {tmp_path}/applied",
        '"Complete"': f"{applied} || echo 'imago-train {state}'",
        '"Failed"': f"{applied} || printf %s {shlex.quote(failure)}",
    }


@needs_kubectl
def test_a_training_that_this_deploy_starts_is_named_while_it_goes_on(cluster, tmp_path):
    result, _ = cluster("deploy", training_after_apply(tmp_path, "- 1"), TAG="7")
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert last.startswith("Training goes on. To follow it: make logs OVERLAY=local FOLLOW=1.")
    assert last.endswith("make deploy OVERLAY=local TAG=7 WAIT_TRAIN=1")


@needs_kubectl
def test_a_training_that_fails_while_old_pods_serve_is_an_error(cluster, tmp_path):
    answers = training_after_apply(tmp_path, "- 0", failure="exit code 2") | FAILED_POD
    result, _ = cluster("deploy", answers)
    assert "Serving." in result.stdout
    assert "the last line of its log: train: /data/photos: no such folder" in error_line(result)


@needs_kubectl
@pytest.mark.parametrize("fails", [True, False])
def test_wait_train_waits_for_the_end_of_training(fails, cluster, tmp_path):
    """It runs at the first query after `apply`, and has ended at a later one."""
    count = f"echo >>{tmp_path}/queries; [ $(wc -l <{tmp_path}/queries) -lt 4 ]"
    answers = training_after_apply(tmp_path, "- 1")
    if fails:
        answers['"Failed"'] = f"{count} || echo 'exit code 2'"
    else:
        ended = f"if {count}; then echo 'imago-train - 1'; else echo 'imago-train True- 0'; fi"
        answers['"Complete"'] = ended
    result, _ = cluster("deploy", answers | FAILED_POD, WAIT_TRAIN="1")
    if fails:
        assert "training failed: exit code 2" in error_line(result)
    else:
        assert result.returncode == 0, result.stderr
        assert result.stdout.endswith("Training has completed.\n")


@needs_kubectl
def test_pods_that_wait_for_something_else_are_waited_for(cluster):
    result, _ = cluster("deploy", pods(report("PodInitializing")), WAIT="0")
    assert "not ready after 0 s; run: kubectl -n imago describe pods" in error_line(result)


@needs_kubectl
def test_with_a_cron_job_the_command_to_train_now_is_printed(cluster):
    with overlay_with_components("cron-training") as name:
        result, _ = cluster("deploy", {"rollout status": "exit 1"}, WAIT="0", OVERLAY=name)
    hint = (
        "train one now: kubectl -n imago create job imago-train-first --from=cronjob/imago-train\n"
    )
    assert result.stdout.endswith(hint), "also before WAIT is over"
    assert error_line(result).startswith("make: not ready after 0 s")
    assert result.stderr.endswith(hint)


@needs_kubectl
def test_scale_refuses_where_an_autoscaler_sets_the_replicas(cluster):
    result, calls = cluster(
        "scale", {"get scaledobject,hpa": "echo horizontalpodautoscaler/imago-serving"}, N="3"
    )
    error = error_line(result)
    assert "an autoscaler sets the replicas" in error
    assert error.endswith("kubectl -n imago edit horizontalpodautoscaler/imago-serving\n")
    assert "--replicas" not in calls


@needs_kubectl
def test_an_autoscaler_is_found_without_keda(cluster):
    result, _ = cluster(
        "scale", {"get scaledobject,hpa": "exit 1", "get hpa": "echo hpa/imago-serving"}, N="3"
    )
    assert "edit hpa/imago-serving" in error_line(result)


@needs_kubectl
@pytest.mark.parametrize("kind", ["deployment", "rollout"])
def test_scale_changes_the_owner_of_the_pods(kind, cluster):
    result, calls = cluster("scale", {} if kind == "rollout" else {"get rollout": "exit 1"}, N="3")
    assert result.returncode == 0, result.stderr
    assert f"-n imago scale {kind}/imago-serving --replicas=3" in calls


@needs_kubectl
@pytest.mark.parametrize("purge", [True, False])
def test_undeploy_keeps_the_volumes_without_purge(purge, cluster):
    result, calls = cluster("undeploy", {}, **{"PURGE": "1"} if purge else {})
    assert result.returncode == 0, result.stderr
    (deleted,) = (line for line in calls.splitlines() if line.startswith("delete"))
    assert ("-l app.kubernetes.io/component!=storage" in deleted) is not purge
    assert ("PURGE=1 deletes them too" in result.stdout) is not purge


def test_storage_is_labelled_in_every_overlay():
    stored = {"Namespace", "PersistentVolume", "PersistentVolumeClaim"}
    for overlay in OVERLAYS:
        for manifest in render(f"overlays/{overlay}"):
            label = manifest["metadata"].get("labels", {}).get("app.kubernetes.io/component")
            assert (label == "storage") is (manifest["kind"] in stored), manifest["kind"]


@needs_kubectl
@pytest.mark.parametrize("follow", [True, False])
def test_logs_are_those_of_all_pods_of_imago(follow, cluster):
    result, calls = cluster(
        "logs",
        {"get pods": "echo pod/imago-serving-x", "logs -l": "echo a line"},
        **{"FOLLOW": "1"} if follow else {},
    )
    assert (result.returncode, result.stdout) == (0, "a line\n")
    assert "logs -l app.kubernetes.io/part-of=imago --all-containers" in calls
    assert ("--follow" in calls) is follow


@needs_kubectl
@pytest.mark.parametrize(
    ("answers", "end"),
    [
        ({'"Failed"': "echo 'exit code 2'"} | FAILED_POD, "train: /data/photos: no such folder"),
        (
            pods(report("CrashLoopBackOff")) | {"logs imago-serving-x -c serve": "echo no memory"},
            "imago-serving-x does not start: no memory",
        ),
    ],
    ids=["training", "serving"],
)
def test_the_last_line_of_logs_says_what_is_wrong(answers, end, cluster):
    """The lines of all pods are mixed, and the last one is of any of them."""
    mixed = {"logs -l": "echo a line of a healthy pod", "get pods": "echo pod/imago-serving-x"}
    result, _ = cluster("logs", answers | mixed)
    assert result.returncode == 0
    assert end in error_message(result)


@needs_kubectl
def test_logs_without_pods_are_one_line(cluster):
    result, _ = cluster("logs", {})
    assert "no pods in the namespace 'imago'; deploy first" in error_line(result)
