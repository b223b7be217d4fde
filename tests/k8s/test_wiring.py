"""References between manifests: metrics ports, routes, grace periods, GPUs."""

import pytest

from support.manifests import CASES, containers, manifests_of_kind, pod_templates
from train.runs.preemption import SHUTDOWN_SECONDS


def trainers(case):
    """Return (arguments, ports) of every training container; a TrainJob has the arguments."""
    jobs = manifests_of_kind(case, "TrainJob")
    for _, template in pod_templates(case):
        for container in containers(template):
            if "imago-train:" in container["image"]:
                ports = {p["name"]: p["containerPort"] for p in container["ports"]}
                yield (jobs[0]["spec"]["trainer"]["args"] if jobs else container["args"]), ports


@pytest.mark.parametrize("case", CASES)
def test_training_exports_metrics_on_the_scraped_port(case):
    found = list(trainers(case))
    assert found
    for arguments, ports in found:
        assert f"--monitor.port={ports['metrics']}" in arguments


@pytest.mark.parametrize("case", CASES)
def test_routes_lead_to_the_http_port_of_the_service(case):
    """Not to the metrics port."""
    services = {
        s["metadata"]["name"]: {p["name"]: p["port"] for p in s["spec"]["ports"]}
        for s in manifests_of_kind(case, "Service")
    }
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
def test_training_has_time_to_save_a_checkpoint(case):
    grace = [
        t["spec"]["terminationGracePeriodSeconds"]
        for _, t in pod_templates(case)
        if any("imago-train:" in c["image"] for c in containers(t))
    ]
    assert grace
    assert min(grace) > SHUTDOWN_SECONDS


@pytest.mark.parametrize("case", [c for c in CASES if "gpu" in c])
def test_gpu_pods_request_a_gpu_and_select_a_node_with_one(case):
    parts = {
        part: case == "overlays/gpu" or f"gpu-{part}" in case for part in ("serving", "training")
    }
    for name, template in pod_templates(case):
        kind = "serving" if name.startswith("Deployment/") else "training"
        *_, container = containers(template)
        spec, limits = template["spec"], container["resources"]["limits"]
        if parts[kind]:
            assert limits["nvidia.com/gpu"] == "1", name
            assert spec["nodeSelector"] == {"nvidia.com/gpu.present": "true"}, name
            assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec[
                "tolerations"
            ], name
        else:
            assert "nvidia.com/gpu" not in limits, name
            assert not {"nodeSelector", "tolerations"} & set(spec), name


def test_gpu_components_change_every_kind_with_pods():
    found = {
        name.partition("/")[0] for case in CASES if "gpu" in case for name, _ in pod_templates(case)
    }
    assert found == {"Deployment", "Job", "CronJob", "TrainingRuntime"}
