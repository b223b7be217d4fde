"""References between manifests: metrics ports, routes, grace periods, GPUs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.manifests import CASES, containers, manifests_of_kind, pod_templates
from train.runs.preemption import SHUTDOWN_SECONDS

GPU_TOLERATION = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}


def trainers(case: str) -> Iterator[tuple[list[str], dict[str, int]]]:
    """Yield (arguments, ports) of every training container; a TrainJob has the arguments."""
    train_jobs = manifests_of_kind(case, "TrainJob")
    for _, template in pod_templates(case):
        for container in containers(template):
            if "imago-train:" not in container["image"]:
                continue
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            trainer = train_jobs[0]["spec"]["trainer"] if train_jobs else container
            yield trainer["args"], ports


@pytest.mark.parametrize("case", CASES)
def test_training_exports_metrics_on_the_scraped_port(case):
    pairs = list(trainers(case))
    assert pairs
    for arguments, ports in pairs:
        assert f"--monitor.port={ports['metrics']}" in arguments


@pytest.mark.parametrize("case", CASES)
def test_routes_lead_to_the_http_port_of_the_service(case):
    """Not to the metrics port."""
    services: dict[str, dict[str, int]] = {}
    for service in manifests_of_kind(case, "Service"):
        ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
        services[service["metadata"]["name"]] = ports

    for ingress in manifests_of_kind(case, "Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                backend = path["backend"]["service"]
                assert backend["port"] == {"name": "http"}
                assert "http" in services[backend["name"]]
    for route in manifests_of_kind(case, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                assert backend["port"] == services[backend["name"]]["http"]


@pytest.mark.parametrize("case", CASES)
def test_pods_that_are_reachable_from_outside_have_a_key(case):
    is_reachable = bool(manifests_of_kind(case, "Ingress", "HTTPRoute"))
    for deployment in manifests_of_kind(case, "Deployment"):
        spec = deployment["spec"]["template"]["spec"]
        (serve,) = spec["containers"]
        secrets = {v["name"]: v["secret"]["secretName"] for v in spec["volumes"] if "secret" in v}
        mounts = {m["mountPath"]: secrets.get(m["name"]) for m in serve["volumeMounts"]}
        variables = {variable["name"]: variable.get("value") for variable in serve.get("env", [])}

        key_file = variables.get("IMAGO_API_KEY_FILE")
        assert (key_file is not None) == (is_reachable or "api-key" in case)
        if key_file is not None:
            assert mounts[str(Path(key_file).parent)] == "imago-api-key"
            assert Path(key_file).name == "key"


@pytest.mark.parametrize("case", CASES)
def test_training_has_time_to_save_a_checkpoint(case):
    grace_periods: list[int] = []
    for _, template in pod_templates(case):
        if "imago-train:" in containers(template)[-1]["image"]:
            grace_periods.append(template["spec"]["terminationGracePeriodSeconds"])
    assert grace_periods
    # The constant is the time in which training promises to end after a signal.
    assert min(grace_periods) > SHUTDOWN_SECONDS


@pytest.mark.parametrize("case", [c for c in CASES if "gpu" in c])
def test_gpu_pods_request_a_gpu_and_select_a_node_with_one(case):
    for name, template in pod_templates(case):
        spec = template["spec"]
        limits = containers(template)[-1]["resources"]["limits"]
        role = "serving" if name.startswith("Deployment/") else "training"
        if case == "overlays/gpu" or f"gpu-{role}" in case:
            assert limits["nvidia.com/gpu"] == "1", name
            assert spec["nodeSelector"] == {"nvidia.com/gpu.present": "true"}, name
            assert GPU_TOLERATION in spec["tolerations"], name
        else:
            assert "nvidia.com/gpu" not in limits, name
            assert not {"nodeSelector", "tolerations"} & set(spec), name


def test_gpu_components_change_every_kind_with_pods():
    kinds: set[str] = set()
    for case in CASES:
        if "gpu" in case:
            kinds |= {name.partition("/")[0] for name, _ in pod_templates(case)}
    assert kinds == {"Deployment", "Job", "CronJob", "TrainingRuntime"}
