"""What make says when it can't deploy: one line, what is wrong and what to do, exit status 2."""
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from rendered import K8S, OVERLAYS, own_overlay, render


def run(verb: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([K8S / "cluster", verb], capture_output=True, text=True, env={**os.environ, **env})


def one_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("make: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")


@pytest.fixture
def nowhere(tmp_path) -> dict[str, str]:
    """A kubectl that knows a cluster which does not answer."""
    config = tmp_path / "config"
    config.write_text("""{apiVersion: v1, kind: Config, current-context: gone, users: [],
      clusters: [{name: gone, cluster: {server: "https://127.0.0.1:1"}}],
      contexts: [{name: gone, context: {cluster: gone, user: nobody}}]}""")
    return {"KUBECONFIG": str(config)}


@needs_kubectl
@pytest.mark.parametrize("verb", ["deploy", "undeploy"])
def test_a_wrong_overlay(verb):
    assert "no overlay 'moon'; there are: cpu gpu local" in one_line(run(verb, OVERLAY="moon"))


@needs_kubectl
@pytest.mark.parametrize("verb", ["deploy", "undeploy", "logs", "scale"])
def test_a_missing_cluster(verb, nowhere):
    assert "no cluster answers in kubectl's context 'gone'" in one_line(run(verb, N="2", **nowhere))


@pytest.mark.parametrize("count", ["", "many", "-1"])
def test_scale_without_a_number(count):
    assert "make scale N=3" in one_line(run("scale", N=count))


@pytest.mark.parametrize("verb", ["deploy", "undeploy", "logs", "scale", "render"])
def test_no_kubectl(verb, tmp_path):
    for tool in ("bash", "dirname", "env", "sed"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    assert "kubectl is not installed" in one_line(run(verb, N="2", PATH=str(tmp_path)))


@needs_kubectl
def test_a_registry_and_a_tag_of_ones_own():
    done = run("render", OVERLAY="gpu", REGISTRY="registry.example.com/team", TAG="7")
    images = {line.split("image: ")[1] for line in done.stdout.splitlines() if " image: " in line}
    assert images == {"registry.example.com/team/imago-serve:7-cuda", "registry.example.com/team/imago-train:7"}


@needs_kubectl
def test_a_model_that_is_an_image_comes_from_that_registry_by_its_own_tag():
    with own_overlay("{kind: Kustomization, namespace: imago, resources: [../local],"
                     " components: [../../components/model-from-image]}") as name:
        done = run("render", OVERLAY=name, REGISTRY="registry.example.com/team", TAG="7")
    assert "reference: registry.example.com/team/imago-model:digits-1\n" in done.stdout


@needs_kubectl
def test_make_passes_them_on(nowhere):
    done = subprocess.run(["make", "deploy", "OVERLAY=moon"], cwd=Path(K8S).parent, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "make: no overlay 'moon'; there are: cpu gpu local"


@pytest.fixture
def cluster(tmp_path):
    """Runs a verb where a cluster does this when it is asked something with these words; also all that it was asked.

    Anything else it leaves without an answer: what is not named is not there.
    """
    def run_there(verb: str, answers: dict[str, str], **env: str) -> tuple[subprocess.CompletedProcess, str]:
        kubectl = tmp_path / "kubectl"
        cases = "".join(f"*'{words}'*) {does} ;;\n" for words, does in answers.items())
        kubectl.write_text(f"""#!/bin/sh
          echo "$*" >>"$0.calls"
          case "$*" in
            kustomize*) exec {shutil.which("kubectl")} "$@" ;;
            {cases}
          esac""")
        kubectl.chmod(0o755)
        done = run(verb, **env, PATH=f"{tmp_path}:{os.environ['PATH']}")
        return done, (tmp_path / "kubectl.calls").read_text()
    return run_there


def refuses(*reasons: str) -> dict[str, str]:
    return {"--dry-run": f"printf '%s\\n' {shlex.join(reasons)} >&2; exit 1", "apply -f -": "exit 1"}


JOB = '"imago-train" is invalid: spec.template: Invalid value: core.PodTemplateSpec{}: field is immutable'


@needs_kubectl
@pytest.mark.parametrize("job", ["The Job", "Error from server (Invalid): Job.batch"])  # kubectl has both
def test_a_job_whose_settings_differ_is_replaced(job, cluster):
    done, asked = cluster("deploy", refuses(f"{job} {JOB}"))
    one_line(done)
    assert "-n imago delete job imago-train --cascade=foreground" in asked
    assert "\napply -f -" in asked


@needs_kubectl
def test_a_job_that_gave_up_is_replaced_though_nothing_differs(cluster, tmp_path):
    gave_up = f"[ -e {tmp_path}/deleted ] || echo 'the backoff limit is reached'"
    done, asked = cluster("deploy", {"get job imago-train": gave_up,
                                     "delete job imago-train": f"touch {tmp_path}/deleted"})
    assert done.returncode == 0, done.stderr
    assert asked.index("delete job imago-train --cascade=foreground") < asked.index("\napply -f -")
    assert "Serving." in done.stdout


@needs_kubectl
def test_a_job_that_has_not_failed_stays(cluster):
    done, asked = cluster("deploy", {})
    assert done.returncode == 0, done.stderr
    assert "delete" not in asked


LAST_APPLIED = """
apiVersion: apps/v1
kind: Deployment
metadata:
  name: imago-serving
spec:
  replicas: 2
  revisionHistoryLimit: 5"""


def deployed(cluster, tmp_path, live: int, overlay: str) -> tuple[list[str | None], str]:
    """The replicas that each Deployment is applied with where so many run, and what is left as applied before."""
    done, _ = cluster("deploy", {
        "get deployment imago-serving": f"echo {live}",
        "view-last-applied": f"echo {shlex.quote(LAST_APPLIED)}",
        "set-last-applied": f"cat >{tmp_path}/before",
        "apply -f -": f"cat >{tmp_path}/applied"}, OVERLAY=overlay)
    assert done.returncode == 0, done.stderr
    applied = yaml.safe_load_all((tmp_path / "applied").read_text())
    before = tmp_path / "before"
    return ([m["spec"].get("replicas") for m in applied if m["kind"] == "Deployment"],
            before.read_text() if before.exists() else LAST_APPLIED)


@needs_kubectl
@pytest.mark.parametrize("overlay", ["local", "cpu"], ids=["scaled by hand", "under an autoscaler that is new"])
def test_a_deploy_leaves_the_replicas_that_run(overlay, cluster, tmp_path):
    replicas, before = deployed(cluster, tmp_path, live=5, overlay=overlay)
    assert replicas == [None]
    assert "replicas" not in before, "apply would take the field away, and the API server make it 1"
    assert yaml.safe_load(before)["spec"] == {"revisionHistoryLimit": 5}


@needs_kubectl
def test_a_deploy_starts_a_service_that_was_scaled_to_nothing(cluster, tmp_path):
    assert deployed(cluster, tmp_path, live=0, overlay="local") == ([2], LAST_APPLIED)


@needs_kubectl
def test_a_deploy_leaves_the_replicas_of_a_canary_to_the_overlay(cluster, tmp_path):
    with own_overlay("{kind: Kustomization, namespace: imago, resources: [../local],"
                     " components: [../../components/canary-plain]}") as name:
        assert deployed(cluster, tmp_path, live=5, overlay=name)[0] == [None, 1]


@needs_kubectl
def test_nothing_is_touched_where_a_volume_cannot_become_what_the_overlay_says(cluster):
    done, asked = cluster("deploy", refuses(
        'The PersistentVolumeClaim "imago-store" is invalid: spec: Forbidden: immutable', f"The Job {JOB}"))
    assert done.returncode == 2
    assert "make: nothing was changed" in done.stderr.splitlines()[-1]
    assert 'PersistentVolumeClaim "imago-store" is invalid' in done.stderr
    assert "delete" not in asked
    assert "\napply -f -" not in asked


def reports(*images: tuple[str, str]) -> str:
    """A pod's line of what its containers wait for, as k8s/cluster asks for it: the init container, the other."""
    return shlex.join(["printf", r"imago-serving-x\t%s\t%s\t\n", *(f"{image} {reason}" for image, reason in images)])


@needs_kubectl
@pytest.mark.parametrize("reason", ["ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName"])
def test_an_image_that_is_not_there_is_one_line(reason, cluster):
    done, _ = cluster("deploy", {
        "rollout status": "exit 1",
        "get pods": reports(("here/imago-serve:1", "PodInitializing"), ("nowhere/imago-serve:1", reason))})
    assert "the image nowhere/imago-serve:1 is not on the node" in one_line(done)
    assert "Serving." not in done.stdout


@needs_kubectl
def test_a_training_that_fails_while_its_service_waits_is_one_line(cluster, tmp_path):
    done, _ = cluster("deploy", {
        "rollout status": "exit 1", "apply -f -": f"touch {tmp_path}/applied",
        "get job imago-train": f"[ ! -e {tmp_path}/applied ] || echo 'Container train exited with 2'"})
    assert "training failed: Container train exited with 2; read its log with: make logs" in one_line(done)


@needs_kubectl
def test_pods_that_wait_for_something_else_may_go_on_waiting(cluster):
    done, _ = cluster("deploy", {"rollout status": "exit 1", "get pods": reports(
        ("here/imago-serve:1", ""), ("here/imago-serve:1", "PodInitializing"))}, WAIT="0")
    assert "not ready after 0 s; look at: kubectl -n imago describe pods" in one_line(done)


@needs_kubectl
def test_a_service_whose_training_waits_for_its_hour_says_how_to_train_now(cluster):
    with own_overlay("{kind: Kustomization, namespace: imago, resources: [../local],"
                     " components: [../../components/cron-training]}") as name:
        done, _ = cluster("deploy", {"rollout status": "exit 1"}, WAIT="0", OVERLAY=name)
    hint = "train one now: kubectl -n imago create job first --from=cronjob/imago-train\n"
    assert done.stdout.endswith(hint), "without waiting for WAIT"
    assert one_line(done).startswith("make: not ready after 0 s")
    assert done.stderr.endswith(hint)


@needs_kubectl
def test_an_autoscaler_keeps_its_replicas(cluster):
    done, asked = cluster("scale", {"get scaledobject,hpa": "echo horizontalpodautoscaler/imago-serving"}, N="3")
    said = one_line(done)
    assert "an autoscaler owns the replicas" in said
    assert said.endswith("kubectl -n imago edit horizontalpodautoscaler/imago-serving\n")
    assert "--replicas" not in asked


@needs_kubectl
def test_an_autoscaler_is_found_where_keda_is_unknown(cluster):
    done, _ = cluster("scale", {"get scaledobject,hpa": "exit 1", "get hpa": "echo hpa/imago-serving"}, N="3")
    assert "edit hpa/imago-serving" in one_line(done)


@needs_kubectl
@pytest.mark.parametrize("kind", ["deployment", "rollout"])
def test_scale_changes_whoever_has_the_pods(kind, cluster):
    done, asked = cluster("scale", {} if kind == "rollout" else {"get rollout": "exit 1"}, N="3")
    assert done.returncode == 0, done.stderr
    assert f"-n imago scale {kind}/imago-serving --replicas=3" in asked


@needs_kubectl
@pytest.mark.parametrize("purge", [True, False])
def test_undeploy_keeps_what_was_stored_unless_it_is_told_to_purge(purge, cluster):
    done, asked = cluster("undeploy", {}, **{"PURGE": "1"} if purge else {})
    assert done.returncode == 0, done.stderr
    (deleted,) = (line for line in asked.splitlines() if line.startswith("delete"))
    assert ("-l app.kubernetes.io/component!=storage" in deleted) is not purge
    assert ("PURGE=1 deletes them too" in done.stdout) is not purge


def test_what_was_stored_is_labelled_so_in_every_overlay():
    stored = {"Namespace", "PersistentVolume", "PersistentVolumeClaim"}
    for overlay in OVERLAYS:
        for manifest in render(f"overlays/{overlay}"):
            label = manifest["metadata"].get("labels", {}).get("app.kubernetes.io/component")
            assert (label == "storage") is (manifest["kind"] in stored), manifest["kind"]


@needs_kubectl
@pytest.mark.parametrize("follow", [True, False])
def test_logs_are_those_of_all_our_pods(follow, cluster):
    done, asked = cluster("logs", {"get pods": "echo pod/imago-serving-x", "logs -l": "echo a line"},
                          **{"FOLLOW": "1"} if follow else {})
    assert (done.returncode, done.stdout) == (0, "a line\n")
    assert "logs -l app.kubernetes.io/part-of=imago --all-containers" in asked
    assert ("--follow" in asked) is follow


@needs_kubectl
def test_logs_of_nothing_are_one_line(cluster):
    done, _ = cluster("logs", {})
    assert "nothing runs in the namespace 'imago'; deploy first" in one_line(done)
