"""Manifests and code agree: settings, ports, arguments, selectors, references."""

import re
import textwrap
import tomllib
from collections.abc import Iterable

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


def find_named(manifests: Iterable[Manifest], name: str) -> Manifest:
    """Return the manifest with this name; raise ValueError without one or with several."""
    (manifest,) = (m for m in manifests if m["metadata"]["name"] == name)
    return manifest


def variables(container: Manifest) -> dict[str, str]:
    """Return the container's own variables, without those of ConfigMaps."""
    return {variable["name"]: variable["value"] for variable in container.get("env", [])}


def serving_settings(case: str) -> dict[str, str]:
    """Return the data of the serving ConfigMap."""
    for config_map in manifests_of_kind(case, "ConfigMap"):
        if config_map["metadata"]["name"].startswith("imago-serving"):
            return config_map["data"]
    raise AssertionError(f"{case} has no ConfigMap imago-serving")


def is_setting(name: str) -> bool:
    return name.startswith(PREFIX)


@pytest.mark.parametrize("case", CASES)
def test_settings_are_those_of_the_service(case, monkeypatch, tmp_path):
    data = serving_settings(case)
    key_file = tmp_path / "key"  # in a cluster, a mounted Secret
    key_file.write_text("s3cret")
    for deployment in manifests_of_kind(case, "Deployment"):
        for container in deployment["spec"]["template"]["spec"]["containers"]:
            environment = data | variables(container)
            settings = {name: value for name, value in environment.items() if is_setting(name)}
            assert settings
            for name in settings:
                assert name.removeprefix(PREFIX).lower() in Settings.model_fields, name
            with monkeypatch.context() as patch:
                for name, value in settings.items():
                    is_key_file = name == f"{PREFIX}API_KEY_FILE"
                    patch.setenv(name, str(key_file) if is_key_file else value)
                Settings()  # accepts the values

    for name in data:
        assert is_setting(name), name


@pytest.mark.parametrize("case", CASES)
def test_ports_agree(case):
    data = serving_settings(case)
    ports = {"http": int(data["IMAGO_PORT"]), "metrics": int(data["IMAGO_METRICS_PORT"])}
    for deployment in manifests_of_kind(case, "Deployment"):
        (serve,) = deployment["spec"]["template"]["spec"]["containers"]
        assert {port["name"]: port["containerPort"] for port in serve["ports"]} == ports

    service = find_named(manifests_of_kind(case, "Service"), "imago-serving")
    for port in service["spec"]["ports"]:
        assert port["targetPort"] == port["name"]
    assert {port["name"] for port in service["spec"]["ports"]} == ports.keys()

    for monitor in manifests_of_kind(case, "PodMonitor", "ServiceMonitor"):
        (endpoint,) = monitor["spec"].get("podMetricsEndpoints") or monitor["spec"]["endpoints"]
        assert endpoint["port"] in ports

    dockerfile = (ROOT / "docker/serve.Dockerfile").read_text()
    exposed = re.search(r"^EXPOSE (.*)", dockerfile, re.MULTILINE)[1]
    assert exposed.split() == [str(port) for port in ports.values()]


def has_labels(template: Manifest, labels: dict[str, str]) -> bool:
    return labels.items() <= template["metadata"]["labels"].items()


def selects_pods(case: str, labels: dict[str, str]) -> bool:
    """Whether a pod of this case has the labels."""
    return any(has_labels(template, labels) for _, template in pod_templates(case))


@pytest.mark.parametrize("case", CASES)
def test_deployments_select_their_own_pods_only(case):
    deployments = manifests_of_kind(case, "Deployment")
    for deployment in deployments:
        spec = deployment["spec"]
        selector = spec["selector"]["matchLabels"]
        assert has_labels(spec["template"], selector)
        for other in deployments:
            is_selected = has_labels(other["spec"]["template"], selector)
            assert is_selected is (other is deployment)
        for constraint in spec["template"]["spec"]["topologySpreadConstraints"]:
            assert has_labels(spec["template"], constraint["labelSelector"]["matchLabels"])


@pytest.mark.parametrize("case", CASES)
def test_selectors_match_pods(case):
    for service in manifests_of_kind(case, "Service"):
        selector = service["spec"]["selector"]
        labels = {k: v for k, v in selector.items() if not k.startswith("batch.kubernetes.io/")}
        assert selects_pods(case, labels)
    for manifest in manifests_of_kind(case, "PodDisruptionBudget", "PodMonitor"):
        assert selects_pods(case, manifest["spec"]["selector"]["matchLabels"])
    for policy in manifests_of_kind(case, "NetworkPolicy"):
        is_for_bucket = policy["metadata"]["name"] == "imago-bucket"
        if not is_for_bucket or "store-bucket" in case:
            assert selects_pods(case, policy["spec"]["podSelector"]["matchLabels"])

    for monitor in manifests_of_kind(case, "ServiceMonitor"):
        labels = monitor["spec"]["selector"]["matchLabels"]
        assert any(has_labels(service, labels) for service in manifests_of_kind(case, "Service"))


@pytest.mark.parametrize("case", CASES)
def test_autoscalers_scale_the_owner_of_the_pods(case):
    kind = "Rollout" if manifests_of_kind(case, "Rollout") else "Deployment"
    for autoscaler in manifests_of_kind(case, "HorizontalPodAutoscaler", "ScaledObject"):
        target = autoscaler["spec"]["scaleTargetRef"]
        assert target.get("kind", "Deployment") == kind
        scaled = find_named(manifests_of_kind(case, kind), target["name"])
        assert "replicas" not in scaled["spec"], "each apply would override the autoscaler"


def config_map_data(case: str) -> dict[str, str]:
    """Return the data of all ConfigMaps together."""
    data: dict[str, str] = {}
    for config_map in manifests_of_kind(case, "ConfigMap"):
        data |= config_map.get("data", {})
    return data


@pytest.mark.parametrize("case", CASES)
def test_references_of_pods_resolve(case):
    names = {(m["kind"], m["metadata"]["name"]) for m in render(case)}
    for _, template in pod_templates(case):
        spec = template["spec"]
        assert ("ServiceAccount", spec["serviceAccountName"]) in names
        for volume in spec["volumes"]:
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert ("PersistentVolumeClaim", claim) in names
            if "secret" in volume:
                assert volume["secret"]["secretName"] in HAND_MADE_SECRETS

        volume_names = {volume["name"] for volume in spec["volumes"]}
        for container in containers(template):
            mounts = container.get("volumeMounts", [])
            assert {mount["name"] for mount in mounts} <= volume_names
            for source in container.get("envFrom", []):
                if "secretRef" in source:
                    assert source["secretRef"]["name"] in HAND_MADE_SECRETS
                else:
                    assert ("ConfigMap", source["configMapRef"]["name"]) in names
            arguments = " ".join(container.get("args", []))
            known = config_map_data(case).keys() | {"JOB_COMPLETION_INDEX"}
            assert set(re.findall(r"\$\((\w+)\)", arguments)) <= known


@pytest.mark.parametrize("case", CASES)
def test_references_of_routes_and_rollouts_resolve(case):
    names = {(m["kind"], m["metadata"]["name"]) for m in render(case)}
    for route in manifests_of_kind(case, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                assert ("Service", backend["name"]) in names
    for rollout in manifests_of_kind(case, "Rollout"):
        assert ("Deployment", rollout["spec"]["workloadRef"]["name"]) in names
        for template in rollout["spec"]["strategy"]["canary"]["analysis"]["templates"]:
            assert ("AnalysisTemplate", template["templateName"]) in names


def test_images_have_the_version_of_the_project():
    for case in CASES:
        for _, template in pod_templates(case):
            for container in containers(template):
                name, _, tag = container["image"].partition(":")
                if name.startswith("localhost/imago-"):
                    assert tag.removesuffix("-cuda") == VERSION, container["image"]


def test_limits_of_ingress_and_gateway_fit_the_service():
    (ingress,) = manifests_of_kind("components/ingress", "Ingress")
    annotations = ingress["metadata"]["annotations"]
    body_size = annotations["nginx.ingress.kubernetes.io/proxy-body-size"]
    max_body_bytes = Settings.model_fields["max_body_bytes"].default
    assert int(body_size.removesuffix("m")) << 20 == max_body_bytes

    deadline = Settings.model_fields["deadline_ms"].default / 1000
    assert int(annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"]) > deadline
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
    trainers = [trainjob["spec"]["trainer"] for trainjob in manifests_of_kind(case, "TrainJob")]
    for _, template in pod_templates(case):
        for container in containers(template):
            if "imago-train:" in container["image"] and container["name"] != "predict":
                trainers.append(container)
    return trainers


def test_training_takes_the_arguments_of_every_manifest(commands):
    command_lines = train_arguments()
    assert len(command_lines) >= 2
    for command_line in command_lines:
        values = {"$(DATA)": "digits", "--store=$(STORE)": "--store=/store"}
        arguments = [values.get(word, word) for word in command_line]
        assert "store: /store" in commands.run(*arguments, "--print_config", cwd=ROOT).text


def test_torchrun_gets_the_number_of_nodes_of_the_job():
    (job,) = manifests_of_kind("components/training-multinode", "Job")
    spec = job["spec"]
    arguments = spec["template"]["spec"]["containers"][0]["args"]
    assert spec["parallelism"] == spec["completions"]
    assert f"--nnodes={spec['completions']}" in arguments
    assert f"--trainer.num_nodes={spec['completions']}" in arguments

    services = manifests_of_kind("components/training-multinode", "Service")
    service = find_named(services, "imago-train")
    port = service["spec"]["ports"][0]["port"]
    assert f"--rdzv-endpoint=imago-train:{port}" in arguments
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

    trainers = [m["spec"]["trainer"] for m in manifests_of_kind(case, "TrainJob")]
    for container in trainers or train_containers(case):
        assert container["command"] == LAUNCHER
        flags = run.parse_args(container["args"])
        assert (flags.module, flags.training_script, flags.max_restarts) == (True, "train", 3)
        assert flags.rdzv_backend == "c10d", "with a static rendezvous no node can be replaced"
        assert flags.rdzv_endpoint in ("imago-train:29500", "$(PET_MASTER_ADDR):$(PET_MASTER_PORT)")


def test_a_cron_job_and_a_canary_are_copies_of_the_originals():
    (cron_job,) = manifests_of_kind("components/cron-training on local", "CronJob")
    (job,) = manifests_of_kind("overlays/local", "Job")
    copied_job = cron_job["spec"]["jobTemplate"]["spec"]
    assert copied_job["template"]["spec"] == job["spec"]["template"]["spec"]

    templates = dict(pod_templates("components/canary-plain"))
    (canary,) = templates["Deployment/imago-serving-canary"]["spec"]["containers"]
    (stable,) = templates["Deployment/imago-serving"]["spec"]["containers"]
    for field in ("image", "ports", "readinessProbe", "resources", "securityContext"):
        assert canary[field] == stable[field]


def test_a_canary_keeps_the_other_variables_of_its_environment():
    templates = dict(pod_templates("components/gpu-serving,canary-plain on local"))
    (serve,) = templates["Deployment/imago-serving-canary"]["spec"]["containers"]
    assert variables(serve) == {
        "IMAGO_ENGINE": "cuda",
        "IMAGO_VERSION": "2",
        "IMAGO_SHADOW_VERSION": "1",
    }


def test_network_policies_allow_the_bucket_of_the_store():
    case = "components/network-policy,store-bucket on local"
    policies = manifests_of_kind(case, "NetworkPolicy")
    policy = find_named(policies, "imago-bucket")["spec"]
    assert {"port": 443, "protocol": "TCP"} in policy["egress"][0]["ports"]
    addresses = {peer["ipBlock"]["cidr"] for peer in policy["egress"][1]["to"]}
    assert "169.254.169.254/32" in addresses, "where pods get the credentials of an identity"

    labels = policy["podSelector"]["matchLabels"]
    for name in ("Deployment/imago-serving", "Job/imago-train"):
        assert has_labels(dict(pod_templates(case))[name], labels)
    assert not has_labels(dict(pod_templates("overlays/cpu"))["Deployment/imago-serving"], labels)


def test_network_policies_allow_the_resolvers_of_nodes():
    """Only an address selects a DNS cache on the node or a resolver of the cloud."""
    policies = manifests_of_kind("overlays/cpu", "NetworkPolicy")
    (dns,) = find_named(policies, "imago-default")["spec"]["egress"]
    ports = {(port["port"], port["protocol"]) for port in dns["ports"]}
    assert ports == {(53, "UDP"), (53, "TCP")}

    addresses = {peer["ipBlock"]["cidr"] for peer in dns["to"] if "ipBlock" in peer}
    assert addresses == {"169.254.20.10/32", "169.254.169.254/32"}
    pods = [peer["podSelector"]["matchLabels"] for peer in dns["to"] if "podSelector" in peer]
    assert pods == [{"k8s-app": "kube-dns"}]


def test_serving_on_gpus_uses_the_cuda_image():
    for case in ("overlays/gpu", "components/gpu-serving on local"):
        template = dict(pod_templates(case))["Deployment/imago-serving"]
        assert all(c["image"].endswith("-cuda") for c in containers(template))


def test_a_store_of_a_component_is_mounted_without_sub_path():
    """An overlay may use a directory of a volume; the store of a component has none."""
    case = "components/model-from-image on local"
    template = dict(pod_templates(case))["Deployment/imago-serving"]
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
            settings = data | variables(container)
            tag = f"{settings['IMAGO_MODEL']}-{settings['IMAGO_VERSION']}"
            assert reference.endswith(f":{tag}"), container["name"]


@pytest.mark.parametrize("overlay", ["local", "cpu", "gpu"])
def test_a_store_in_a_bucket_needs_no_shared_volume(overlay):
    case = f"components/store-bucket on {overlay}"
    for claim in manifests_of_kind(case, "PersistentVolumeClaim"):
        assert claim["metadata"]["name"] == "imago-data"
        assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    volumes = manifests_of_kind(case, "PersistentVolume")
    assert "imago-store" not in [volume["metadata"]["name"] for volume in volumes]

    credentials = {"secretRef": {"name": "imago-bucket", "optional": True}}
    for name, template in pod_templates(case):
        assert "/store" not in str(template["spec"]["volumes"]), name
        for container in containers(template):
            assert credentials in container["envFrom"], name
            assert "/store" not in [m["mountPath"] for m in container["volumeMounts"]], name
    data = config_map_data(case)
    assert data["STORE"] == data["IMAGO_STORE"] == "s3://bucket/imago"


def test_the_overlay_in_the_readme_trains_and_serves_the_users_data():
    text = (K8S / "README.md").read_text()
    start = text.index("    apiVersion: kustomize")
    end = text.index("Then `make deploy OVERLAY=mine`")
    manifests = render_overlay(textwrap.dedent(text[start:end]))

    data: dict[str, str] = {}
    for manifest in manifests:
        if manifest["kind"] == "ConfigMap":
            assert manifest["immutable"]
            data |= manifest["data"]
    assert (data["DATA"], data["IMAGO_MODEL"]) == ("/data/photos", "photos")


def test_volumes_of_the_node_can_be_claimed_from_any_namespace():
    manifests = render_overlay("{kind: Kustomization, namespace: team, resources: [../local]}")
    volumes: dict[str, Manifest] = {}
    claims: dict[str, Manifest] = {}
    for manifest in manifests:
        metadata = manifest["metadata"]
        assert metadata.get("namespace", "team") == "team"
        if manifest["kind"] == "PersistentVolume":
            volumes[metadata["name"]] = manifest["spec"]
        if manifest["kind"] == "PersistentVolumeClaim":
            claims[manifest["spec"]["volumeName"]] = manifest["spec"]

    assert volumes.keys() == claims.keys()
    for name, volume in volumes.items():
        storage_class = volume["storageClassName"]
        assert "claimRef" not in volume, "it would fix the namespace"
        assert storage_class, "without a class other claims could bind it"
        assert storage_class == claims[name]["storageClassName"]
