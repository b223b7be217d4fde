"""The manifests and the code say the same: settings, ports, paths, flags, recipes, selectors, references."""
import re
import tomllib

import pytest
from rendered import CASES, K8S, SECRETS, containers, of, pod_specs, render

from serve.settings import PREFIX, Settings

ROOT = K8S.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def settings_of(case):
    """The ConfigMap's settings and each serving container's own variables."""
    data = next(m["data"] for m in of(case, "ConfigMap") if m["metadata"]["name"].startswith("imago-serving"))
    own = [{e["name"]: e["value"] for e in c.get("env", []) if e["name"].startswith(PREFIX)}
           for d in of(case, "Deployment") for c in d["spec"]["template"]["spec"]["containers"]]
    return data, own


@pytest.mark.parametrize("case", CASES)
def test_settings_are_those_of_the_service(case, monkeypatch):
    data, own = settings_of(case)
    for extra in own:
        found = {k: v for k, v in {**data, **extra}.items() if k.startswith(PREFIX)}
        assert found
        for name in found:
            assert name.removeprefix(PREFIX).lower() in Settings.model_fields, name
        with monkeypatch.context() as patch:
            for name, value in found.items():
                patch.setenv(name, value)
            Settings()  # and their values are taken
    for name in set(data) - {k for k in data if k.startswith(PREFIX)}:
        assert case == "components/model-from-bucket", name


@pytest.mark.parametrize("case", CASES)
def test_ports_agree(case):
    data, _ = settings_of(case)
    wanted = {"http": int(data["IMAGO_PORT"]), "metrics": int(data["IMAGO_METRICS_PORT"])}
    for deployment in of(case, "Deployment"):
        (serve,) = deployment["spec"]["template"]["spec"]["containers"]
        assert {p["name"]: p["containerPort"] for p in serve["ports"]} == wanted
    (service,) = (s for s in of(case, "Service") if s["metadata"]["name"] == "imago-serving")
    assert {p["name"]: p["targetPort"] for p in service["spec"]["ports"]} == {n: n for n in wanted}
    for monitor in of(case, "PodMonitor", "ServiceMonitor"):
        (endpoint,) = monitor["spec"].get("podMetricsEndpoints") or monitor["spec"]["endpoints"]
        assert endpoint["port"] in wanted
    exposed = re.search(r"^EXPOSE (.*)", (ROOT / "docker/serve.Dockerfile").read_text(), re.MULTILINE).group(1)
    assert exposed.split() == [str(port) for port in wanted.values()]


def labelled(template, wanted):
    return wanted.items() <= template["metadata"]["labels"].items()


@pytest.mark.parametrize("case", CASES)
def test_selectors_find_pods(case):
    templates = [template for _, template in pod_specs(case)]
    for manifest in render(case):
        spec = manifest.get("spec", {})
        match manifest["kind"]:
            case "Deployment":
                assert labelled(spec["template"], spec["selector"]["matchLabels"])
                others = [d["spec"]["template"] for d in of(case, "Deployment") if d is not manifest]
                assert not any(labelled(other, spec["selector"]["matchLabels"]) for other in others)
                for constraint in spec["template"]["spec"]["topologySpreadConstraints"]:
                    assert labelled(spec["template"], constraint["labelSelector"]["matchLabels"])
            case "Service" if spec["selector"].keys() != {"batch.kubernetes.io/job-name"}:
                assert any(labelled(t, spec["selector"]) for t in templates)
            case "Service":
                jobs = [job["metadata"]["name"] for job in of(case, "Job")]
                assert spec["selector"]["batch.kubernetes.io/job-name"] in jobs
            case "PodDisruptionBudget" | "PodMonitor":
                assert any(labelled(t, spec["selector"]["matchLabels"]) for t in templates)
            case "ServiceMonitor":
                services = [s["metadata"]["labels"] for s in of(case, "Service")]
                assert any(spec["selector"]["matchLabels"].items() <= labels.items() for labels in services)
            case "NetworkPolicy" if manifest["metadata"]["name"] != "imago-training":
                assert any(labelled(t, spec["podSelector"]["matchLabels"]) for t in templates)
            case "HorizontalPodAutoscaler" | "ScaledObject":
                assert spec["scaleTargetRef"]["name"] in [d["metadata"]["name"] for d in of(case, "Deployment")]
                (scaled,) = of(case, "Deployment")
                assert "replicas" not in scaled["spec"], "each apply would undo the autoscaler"


@pytest.mark.parametrize("case", CASES)
def test_references_resolve(case):
    names = {(m["kind"], m["metadata"]["name"]) for m in render(case)}
    for _, template in pod_specs(case):
        spec = template["spec"]
        assert ("ServiceAccount", spec["serviceAccountName"]) in names
        for volume in spec["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in names
            if secret := volume.get("secret"):
                assert secret["secretName"] in SECRETS
        for container in containers(template):
            assert {m["name"] for m in container.get("volumeMounts", [])} <= {v["name"] for v in spec["volumes"]}
            for source in container.get("envFrom", []):
                assert ("ConfigMap", source["configMapRef"]["name"]) in names
    for route in of(case, "HTTPRoute"):
        assert all(("Service", b["name"]) in names for r in route["spec"]["rules"] for b in r["backendRefs"])
    for rollout in of(case, "Rollout"):
        assert ("Deployment", rollout["spec"]["workloadRef"]["name"]) in names
        assert all(("AnalysisTemplate", t["templateName"]) in names
                   for t in rollout["spec"]["strategy"]["canary"]["analysis"]["templates"])


def test_the_images_carry_the_version_of_the_project():
    for case in CASES:
        for _, template in pod_specs(case):
            for container in containers(template):
                if container["image"].startswith("localhost/imago-"):
                    assert container["image"].split(":")[1].removesuffix("-cuda") == VERSION, container["image"]


def test_the_bounds_outside_are_those_inside():
    (ingress,) = of("components/ingress", "Ingress")
    notes = ingress["metadata"]["annotations"]
    largest = Settings.model_fields["max_body_bytes"].default
    assert int(notes["nginx.ingress.kubernetes.io/proxy-body-size"].removesuffix("m")) << 20 == largest
    deadline = Settings.model_fields["deadline_ms"].default / 1000
    assert int(notes["nginx.ingress.kubernetes.io/proxy-read-timeout"]) > deadline
    (route,) = of("components/gateway-route", "HTTPRoute")
    assert int(route["spec"]["rules"][0]["timeouts"]["request"].removesuffix("s")) > deadline


def train_arguments():
    """Every different command line of training in the manifests, as `python -m train` gets it."""
    found = set()
    for case in CASES:
        lines = [c for _, t in pod_specs(case) for c in containers(t) if "imago-train:" in c["image"]]
        lines += [m["spec"]["trainer"] for m in of(case, "TrainJob")]
        for line in lines:
            words = line["args"]
            if line.get("command") == ["torchrun"]:
                words = words[words.index("train") + 1:]
            found.add(tuple(words))
    return sorted(found)


def test_training_takes_the_arguments_of_every_manifest(commands):
    found = train_arguments()
    assert len(found) >= 2
    for words in found:
        assert "store: /store" in commands.run(*words, "--print_config", cwd=ROOT).text


def test_torchrun_is_told_as_many_nodes_as_the_job_has():
    (job,) = of("components/training-multinode", "Job")
    spec, container = job["spec"], job["spec"]["template"]["spec"]["containers"][0]
    assert spec["parallelism"] == spec["completions"]
    assert f"--nnodes={spec['completions']}" in container["args"]
    assert f"--trainer.num_nodes={spec['completions']}" in container["args"]
    endpoint = next(a for a in container["args"] if a.startswith("--rdzv-endpoint="))
    service = next(s for s in of("components/training-multinode", "Service") if s["metadata"]["name"] == "imago-train")
    assert endpoint.endswith(f"=imago-train-0.{service['metadata']['name']}:{service['spec']['ports'][0]['port']}")
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]


def test_a_cron_job_and_a_canary_are_copies_of_what_they_stand_for():
    (cron,), (job,) = of("components/cron-training", "CronJob"), of("components/pdb", "Job")
    assert cron["spec"]["jobTemplate"]["spec"]["template"]["spec"] == job["spec"]["template"]["spec"]
    named = {d["metadata"]["name"]: d for d in of("components/canary-plain", "Deployment")}
    canary, stable = named["imago-serving-canary"], named["imago-serving"]
    same = ("image", "ports", "readinessProbe", "resources", "securityContext")
    one, other = (d["spec"]["template"]["spec"]["containers"][0] for d in (canary, stable))
    assert {k: one[k] for k in same} == {k: other[k] for k in same}


@pytest.mark.parametrize("component", ["model-from-bucket", "model-from-image"])
def test_a_store_that_a_component_brings_is_mounted_whole(component):
    """An overlay may keep its store in a folder of a volume; what takes the volume's place has no such folder."""
    template = dict(pod_specs(f"components/{component} on local"))["Deployment/imago-serving"]
    mounts = [m for c in containers(template) for m in c["volumeMounts"] if m["name"] == "store"]
    assert len(mounts) == 2
    assert not any("subPath" in m for m in mounts)
