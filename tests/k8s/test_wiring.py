"""What one manifest says of another, or of the code: ports, backends, grace, what a GPU takes."""

import pytest
from support.manifests import CASES, containers, manifests_of_kind, pod_templates

from train.runs.preemption import SECONDS


def trainers(case):
    """(arguments, ports) of every training container; a TrainJob's arguments stand beside its runtime."""
    jobs = manifests_of_kind(case, "TrainJob")
    for _, template in pod_templates(case):
        for container in containers(template):
            if "imago-train:" in container["image"]:
                ports = {p["name"]: p["containerPort"] for p in container["ports"]}
                yield (jobs[0]["spec"]["trainer"]["args"] if jobs else container["args"]), ports


@pytest.mark.parametrize("case", CASES)
def test_training_exports_its_metrics_where_they_are_scraped(case):
    found = list(trainers(case))
    assert found
    for arguments, ports in found:
        assert f"--monitor.port={ports['metrics']}" in arguments


@pytest.mark.parametrize("case", CASES)
def test_routes_lead_to_a_port_that_the_service_has(case):
    """And never to its metrics."""
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
def test_training_has_the_time_to_save_what_it_learnt(case):
    grace = [
        t["spec"]["terminationGracePeriodSeconds"]
        for _, t in pod_templates(case)
        if any("imago-train:" in c["image"] for c in containers(t))
    ]
    assert grace
    assert min(grace) > SECONDS


@pytest.mark.parametrize("case", [c for c in CASES if "gpu" in c])
def test_pods_on_gpus_ask_for_one_and_for_a_node_that_has_it(case):
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


def test_gpus_are_asked_for_by_every_kind_that_makes_pods():
    found = {
        name.partition("/")[0] for case in CASES if "gpu" in case for name, _ in pod_templates(case)
    }
    assert found == {"Deployment", "Job", "CronJob", "TrainingRuntime"}
