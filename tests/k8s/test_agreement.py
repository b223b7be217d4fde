"""Manifests and code agree: settings, ports, arguments, selectors, references."""

import re
import tomllib

import pytest

from serve.settings import PREFIX, Settings
from support.manifests import (
    CASES,
    HAND_MADE_SECRETS,
    K8S,
    Manifest,
    containers,
    manifests_of_kind,
    pod_templates,
    render,
    render_overlay,
)

ROOT = K8S.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def serving_settings(case: str) -> dict[str, str]:
    """Return the data of the serving ConfigMap."""
    for config_map in manifests_of_kind(case, "ConfigMap"):
        if config_map["metadata"]["name"].startswith("imago-serving"):
            return config_map["data"]
    raise AssertionError(f"{case} has no ConfigMap imago-serving")


def is_setting(name: str) -> bool:
    return name.startswith(PREFIX)


@pytest.mark.parametrize("case", CASES)
def test_settings_are_those_of_the_service(case, monkeypatch):
    data = serving_settings(case)
    for deployment in manifests_of_kind(case, "Deployment"):
        for container in deployment["spec"]["template"]["spec"]["containers"]:
            variables = {e["name"]: e["value"] for e in container.get("env", [])}
            settings = {k: v for k, v in (data | variables).items() if is_setting(k)}
            assert settings
            for name in settings:
                assert name.removeprefix(PREFIX).lower() in Settings.model_fields, name
            with monkeypatch.context() as patch:
                for name, value in settings.items():
                    patch.setenv(name, value)
                Settings()  # accepts the values

    for name in data:
        assert is_setting(name) or "model-from-bucket" in case, name


@pytest.mark.parametrize("case", CASES)
def test_ports_agree(case):
    data = serving_settings(case)
    wanted = {"http": int(data["IMAGO_PORT"]), "metrics": int(data["IMAGO_METRICS_PORT"])}
    for deployment in manifests_of_kind(case, "Deployment"):
        (serve,) = deployment["spec"]["template"]["spec"]["containers"]
        assert {p["name"]: p["containerPort"] for p in serve["ports"]} == wanted
    (service,) = (
        s for s in manifests_of_kind(case, "Service") if s["metadata"]["name"] == "imago-serving"
    )
    assert {p["name"]: p["targetPort"] for p in service["spec"]["ports"]} == {n: n for n in wanted}
    for monitor in manifests_of_kind(case, "PodMonitor", "ServiceMonitor"):
        (endpoint,) = monitor["spec"].get("podMetricsEndpoints") or monitor["spec"]["endpoints"]
        assert endpoint["port"] in wanted
    exposed = re.search(
        r"^EXPOSE (.*)", (ROOT / "docker/serve.Dockerfile").read_text(), re.MULTILINE
    ).group(1)
    assert exposed.split() == [str(port) for port in wanted.values()]


def labelled(template, wanted):
    return wanted.items() <= template["metadata"]["labels"].items()


@pytest.mark.parametrize("case", CASES)
def test_selectors_find_pods(case):
    templates = [template for _, template in pod_templates(case)]
    for manifest in render(case):
        spec = manifest.get("spec", {})
        match manifest["kind"]:
            case "Deployment":
                assert labelled(spec["template"], spec["selector"]["matchLabels"])
                others = [
                    d["spec"]["template"]
                    for d in manifests_of_kind(case, "Deployment")
                    if d is not manifest
                ]
                assert not any(labelled(other, spec["selector"]["matchLabels"]) for other in others)
                for constraint in spec["template"]["spec"]["topologySpreadConstraints"]:
                    assert labelled(spec["template"], constraint["labelSelector"]["matchLabels"])
            case "Service":
                wanted = {
                    k: v
                    for k, v in spec["selector"].items()
                    if not k.startswith("batch.kubernetes.io/")
                }
                assert any(labelled(t, wanted) for t in templates)
            case "PodDisruptionBudget" | "PodMonitor":
                assert any(labelled(t, spec["selector"]["matchLabels"]) for t in templates)
            case "ServiceMonitor":
                services = [s["metadata"]["labels"] for s in manifests_of_kind(case, "Service")]
                assert any(
                    spec["selector"]["matchLabels"].items() <= labels.items() for labels in services
                )
            case "NetworkPolicy" if (
                "bucket" not in manifest["metadata"]["name"] or "bucket" in case
            ):
                assert any(labelled(t, spec["podSelector"]["matchLabels"]) for t in templates)
            case "HorizontalPodAutoscaler" | "ScaledObject":
                kind = "Rollout" if manifests_of_kind(case, "Rollout") else "Deployment"
                assert spec["scaleTargetRef"].get("kind", "Deployment") == kind
                scaled = {d["metadata"]["name"]: d for d in manifests_of_kind(case, kind)}[
                    spec["scaleTargetRef"]["name"]
                ]
                assert "replicas" not in scaled["spec"], "each apply would override the autoscaler"


@pytest.mark.parametrize("case", CASES)
def test_references_resolve(case):
    names = {(m["kind"], m["metadata"]["name"]) for m in render(case)}
    for _, template in pod_templates(case):
        spec = template["spec"]
        assert ("ServiceAccount", spec["serviceAccountName"]) in names
        for volume in spec["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in names
            if secret := volume.get("secret"):
                assert secret["secretName"] in HAND_MADE_SECRETS
        for container in containers(template):
            assert {m["name"] for m in container.get("volumeMounts", [])} <= {
                v["name"] for v in spec["volumes"]
            }
            for source in container.get("envFrom", []):
                assert ("ConfigMap", source["configMapRef"]["name"]) in names
            data = {
                key: value
                for c in manifests_of_kind(case, "ConfigMap")
                for key, value in c.get("data", {}).items()
            }
            for variable in re.findall(r"\$\((\w+)\)", " ".join(container.get("args", []))):
                assert variable in data, f"{container['name']}: {variable}"
    for route in manifests_of_kind(case, "HTTPRoute"):
        assert all(
            ("Service", b["name"]) in names
            for r in route["spec"]["rules"]
            for b in r["backendRefs"]
        )
    for rollout in manifests_of_kind(case, "Rollout"):
        assert ("Deployment", rollout["spec"]["workloadRef"]["name"]) in names
        assert all(
            ("AnalysisTemplate", t["templateName"]) in names
            for t in rollout["spec"]["strategy"]["canary"]["analysis"]["templates"]
        )


def test_images_have_the_version_of_the_project():
    for case in CASES:
        for _, template in pod_templates(case):
            for container in containers(template):
                if container["image"].startswith("localhost/imago-"):
                    assert container["image"].split(":")[1].removesuffix("-cuda") == VERSION, (
                        container["image"]
                    )


def test_limits_of_ingress_and_gateway_fit_the_service():
    (ingress,) = manifests_of_kind("components/ingress", "Ingress")
    notes = ingress["metadata"]["annotations"]
    largest = Settings.model_fields["max_body_bytes"].default
    assert (
        int(notes["nginx.ingress.kubernetes.io/proxy-body-size"].removesuffix("m")) << 20 == largest
    )
    deadline = Settings.model_fields["deadline_ms"].default / 1000
    assert int(notes["nginx.ingress.kubernetes.io/proxy-read-timeout"]) > deadline
    (route,) = manifests_of_kind("components/gateway-route", "HTTPRoute")
    assert int(route["spec"]["rules"][0]["timeouts"]["request"].removesuffix("s")) > deadline


LAUNCHER = ["python", "-m", "train", "launch"]


def train_arguments() -> list[tuple[str, ...]]:
    """Return every training command line of the manifests, as `python -m train` gets it."""
    command_lines = set()
    for case in CASES:
        for container in train_containers(case):
            arguments = container["args"]
            if container.get("command") == LAUNCHER:
                arguments = arguments[arguments.index("train") + 1 :]
            assert "$(DATA)" in arguments
            command_lines.add(tuple(arguments))
    return sorted(command_lines)


def train_containers(case: str) -> list[Manifest]:
    """Return the training containers; a TrainJob has command and arguments in `trainer`."""
    found = [trainjob["spec"]["trainer"] for trainjob in manifests_of_kind(case, "TrainJob")]
    for _, template in pod_templates(case):
        for container in containers(template):
            if "imago-train:" in container["image"]:
                found.append(container)
    return found


def test_training_takes_the_arguments_of_every_manifest(commands):
    command_lines = train_arguments()
    assert len(command_lines) >= 2
    for command_line in command_lines:
        arguments = ["digits" if word == "$(DATA)" else word for word in command_line]
        assert "store: /store" in commands.run(*arguments, "--print_config", cwd=ROOT).text


def test_torchrun_gets_the_number_of_nodes_of_the_job():
    (job,) = manifests_of_kind("components/training-multinode", "Job")
    spec, container = job["spec"], job["spec"]["template"]["spec"]["containers"][0]
    assert spec["parallelism"] == spec["completions"]
    assert f"--nnodes={spec['completions']}" in container["args"]
    assert f"--trainer.num_nodes={spec['completions']}" in container["args"]
    endpoint = next(a for a in container["args"] if a.startswith("--rdzv-endpoint="))
    service = next(
        s
        for s in manifests_of_kind("components/training-multinode", "Service")
        if s["metadata"]["name"] == "imago-train"
    )
    assert endpoint.endswith(
        f"={service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    )
    assert service["spec"]["clusterIP"] == "None", "its address must be that of the first pod"
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"], (
        "torchrun announces its full name"
    )
    assert service["spec"]["selector"]["batch.kubernetes.io/job-completion-index"] == "0"


def test_kubeflow_starts_as_many_processes_as_the_trainer_expects():
    (job,) = manifests_of_kind("components/training-kubeflow", "TrainJob")
    (runtime,) = manifests_of_kind("components/training-kubeflow", "TrainingRuntime")
    trainer = job["spec"]["trainer"]
    assert f"--trainer.num_nodes={trainer['numNodes']}" in trainer["args"]
    assert f"--trainer.devices={trainer.get('numProcPerNode', 'auto')}" in trainer["args"]
    assert runtime["spec"]["mlPolicy"]["numNodes"] == trainer["numNodes"]


@pytest.mark.parametrize("case", [c for c in CASES if "multinode" in c or "kubeflow" in c])
def test_on_several_nodes_the_launcher_is_used(case):
    """The Job needs its exit status; torchrun always exits with 1."""
    from torch.distributed import run

    started = [m["spec"]["trainer"] for m in manifests_of_kind(case, "TrainJob")]
    for container in started or train_containers(case):
        assert container["command"] == LAUNCHER
        flags = run.parse_args(container["args"])
        assert (flags.module, flags.training_script, flags.max_restarts) == (True, "train", 3)
        assert flags.rdzv_backend == "c10d", "with a static rendezvous no node can be replaced"
        assert flags.rdzv_endpoint in ("imago-train:29500", "$(PET_MASTER_ADDR):$(PET_MASTER_PORT)")


def test_a_cron_job_and_a_canary_are_copies_of_the_originals():
    (cron,), (job,) = (
        manifests_of_kind("components/cron-training on local", "CronJob"),
        manifests_of_kind("overlays/local", "Job"),
    )
    assert (
        cron["spec"]["jobTemplate"]["spec"]["template"]["spec"] == job["spec"]["template"]["spec"]
    )
    named = {
        d["metadata"]["name"]: d for d in manifests_of_kind("components/canary-plain", "Deployment")
    }
    canary, stable = named["imago-serving-canary"], named["imago-serving"]
    same = ("image", "ports", "readinessProbe", "resources", "securityContext")
    one, other = (d["spec"]["template"]["spec"]["containers"][0] for d in (canary, stable))
    assert {k: one[k] for k in same} == {k: other[k] for k in same}


def test_a_canary_keeps_the_other_variables_of_its_environment():
    with_gpu = dict(pod_templates("components/gpu-serving,canary-plain on local"))[
        "Deployment/imago-serving-canary"
    ]
    (serve,) = with_gpu["spec"]["containers"]
    found = {e["name"]: e["value"] for e in serve["env"]}
    assert found == {"IMAGO_ENGINE": "cuda", "IMAGO_VERSION": "2", "IMAGO_SHADOW_VERSION": "1"}


def test_network_policies_allow_the_bucket_of_the_model():
    case = "components/network-policy,model-from-bucket on local"
    (policy,) = (
        p["spec"]
        for p in manifests_of_kind(case, "NetworkPolicy")
        if p["metadata"]["name"] == "imago-serving-bucket"
    )
    template = dict(pod_templates(case))["Deployment/imago-serving"]
    assert labelled(template, policy["podSelector"]["matchLabels"])
    assert {"port": 443, "protocol": "TCP"} in policy["egress"][0]["ports"]
    without = dict(pod_templates("overlays/cpu"))["Deployment/imago-serving"]
    assert not labelled(without, policy["podSelector"]["matchLabels"])


def test_network_policies_allow_the_resolvers_of_nodes():
    """Only an address selects a DNS cache on the node or a resolver of the cloud."""
    (policy,) = (
        p["spec"]
        for p in manifests_of_kind("overlays/cpu", "NetworkPolicy")
        if p["metadata"]["name"] == "imago-default"
    )
    (dns,) = policy["egress"]
    assert {(p["port"], p["protocol"]) for p in dns["ports"]} == {(53, "UDP"), (53, "TCP")}
    assert {to["ipBlock"]["cidr"] for to in dns["to"] if "ipBlock" in to} == {
        "169.254.20.10/32",
        "169.254.169.254/32",
    }
    assert {"k8s-app": "kube-dns"} in [
        to["podSelector"]["matchLabels"] for to in dns["to"] if "podSelector" in to
    ]


def test_serving_on_gpus_uses_the_cuda_image():
    for case in ("overlays/gpu", "components/gpu-serving on local"):
        template = dict(pod_templates(case))["Deployment/imago-serving"]
        assert all(c["image"].endswith("-cuda") for c in containers(template))


@pytest.mark.parametrize("component", ["model-from-bucket", "model-from-image"])
def test_a_store_of_a_component_is_mounted_without_sub_path(component):
    """An overlay may use a directory of a volume; the store of a component has none."""
    template = dict(pod_templates(f"components/{component} on local"))["Deployment/imago-serving"]
    mounts = [m for c in containers(template) for m in c["volumeMounts"] if m["name"] == "store"]
    assert len(mounts) == 2
    assert not any("subPath" in m for m in mounts)


@pytest.mark.parametrize("case", [c for c in CASES if "model-from-image" in c])
def test_a_model_image_has_the_version_that_its_pod_serves(case):
    data = serving_settings(case)
    for deployment in manifests_of_kind(case, "Deployment"):
        spec = deployment["spec"]["template"]["spec"]
        (reference,) = (v["image"]["reference"] for v in spec["volumes"] if "image" in v)
        for container in spec["initContainers"] + spec["containers"]:
            found = data | {e["name"]: e["value"] for e in container.get("env", [])}
            assert reference.endswith(f":{found['IMAGO_MODEL']}-{found['IMAGO_VERSION']}"), (
                container["name"]
            )


def test_the_overlay_in_the_readme_trains_and_serves_the_users_data():
    text = (K8S / "README.md").read_text()
    lines = text[
        text.index("    apiVersion: kustomize") : text.index("Then `make deploy OVERLAY=mine`")
    ].splitlines()
    manifests = render_overlay("\n".join(line[4:] for line in lines))
    maps = [m for m in manifests if m["kind"] == "ConfigMap"]
    data = {k: v for m in maps for k, v in m["data"].items()}
    assert (data["DATA"], data["IMAGO_MODEL"]) == ("/data/photos", "photos")
    assert all(m["immutable"] for m in maps)


def test_volumes_of_the_node_can_be_claimed_from_any_namespace():
    manifests = render_overlay("{kind: Kustomization, namespace: team, resources: [../local]}")
    assert {m["metadata"]["namespace"] for m in manifests if "namespace" in m["metadata"]} == {
        "team"
    }
    volumes = {
        m["metadata"]["name"]: m["spec"] for m in manifests if m["kind"] == "PersistentVolume"
    }
    claims = {
        m["spec"]["volumeName"]: m["spec"]
        for m in manifests
        if m["kind"] == "PersistentVolumeClaim"
    }
    assert volumes.keys() == claims.keys()
    for name, volume in volumes.items():
        assert "claimRef" not in volume, "it would fix the namespace"
        assert volume["storageClassName"] == claims[name]["storageClassName"] != "", (
            "other claims could bind it"
        )
