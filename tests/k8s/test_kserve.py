"""Serving by KServe: the runtime and the service agree with each other and with `serve`."""

import kubernetes_validate

from serve import options
from support.fake_kubectl import needs_kubectl
from support.manifests import KSERVE, Manifest, manifests_of_kind, overlay_with_components


def runtime_spec() -> Manifest:
    (runtime,) = manifests_of_kind(KSERVE, "ServingRuntime")
    return runtime["spec"]


def test_kserve_replaces_the_deployment_and_keeps_training():
    assert not manifests_of_kind(KSERVE, "Deployment", "Service")
    assert [job["metadata"]["name"] for job in manifests_of_kind(KSERVE, "Job")] == ["imago-train"]


def test_the_service_names_the_runtime_its_format_and_its_protocol():
    (service,) = manifests_of_kind(KSERVE, "InferenceService")
    (runtime,) = manifests_of_kind(KSERVE, "ServingRuntime")
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    (supported,) = runtime["spec"]["supportedModelFormats"]
    assert model["modelFormat"].items() <= supported.items()
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]


def test_the_runtime_is_a_pod_of_the_restricted_profile():
    spec = runtime_spec()
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "runtime"},
        "spec": {"containers": spec["containers"], "volumes": spec["volumes"]},
    }
    kubernetes_validate.validate(pod, "1.30", strict=True)
    (container,) = spec["containers"]
    context = container["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}


def test_serve_takes_the_arguments_of_the_runtime():
    (container,) = runtime_spec()["containers"]
    flags: dict[str, str] = {}
    for argument in container["args"]:
        name, _, value = argument.removeprefix("--").partition("=")
        flags[name.replace("-", "_")] = value
    assert flags.keys() <= options.Settings.model_fields.keys()
    assert flags["bundle"] == "/mnt/models", "where KServe copies storageUri to"
    settings = options.parse_settings(flags)
    assert [port["containerPort"] for port in container["ports"]] == [settings.port]
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == settings.port
    annotations = runtime_spec()["annotations"]
    assert annotations["prometheus.kserve.io/port"] == str(settings.metrics_port)


@needs_kubectl
def test_deploy_does_not_wait_for_a_deployment(cluster):
    with overlay_with_components("kserve") as name:
        result, calls = cluster("deploy", {"rollout status": "exit 1"}, OVERLAY=name)
    assert result.returncode == 0, result.stderr
    assert "get inferenceservices --watch" in result.stdout
    assert "rollout status" not in calls
