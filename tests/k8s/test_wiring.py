"""References between manifests: metrics ports, routes, grace periods, GPUs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.commands.shards import Shard, parse_shard
from support.manifests import CASES, containers, manifests_of_kind, pod_templates
from train.runs.preemption import SHUTDOWN_SECONDS

GPU_TOLERATION = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}


def trainers(case: str) -> Iterator[tuple[list[str], dict[str, int]]]:
    """Yield (arguments, ports) of every training container; a TrainJob has the arguments."""
    train_jobs = manifests_of_kind(case, "TrainJob")
    for _, template in pod_templates(case):
        for container in containers(template):
            if "imago-train:" not in container["image"] or container["name"] == "predict":
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
        container = containers(template)[-1]
        if "imago-train:" in container["image"] and container["name"] != "predict":
            grace_periods.append(template["spec"]["terminationGracePeriodSeconds"])
    assert grace_periods
    # The constant is the time in which training promises to end after a signal.
    assert min(grace_periods) > SHUTDOWN_SECONDS


@pytest.mark.parametrize("case", [c for c in CASES if "gpu" in c])
def test_gpu_pods_request_a_gpu_and_no_label_of_an_existing_node(case):
    """Autoscalers of nodes create one for the request; its labels exist only afterwards."""
    for name, template in pod_templates(case):
        spec = template["spec"]
        limits = containers(template)[-1]["resources"]["limits"]
        role = "serving" if name.startswith("Deployment/") else "training"
        if case == "overlays/gpu" or f"gpu-{role}" in case:
            assert limits["nvidia.com/gpu"] == "1", name
            assert "nodeSelector" not in spec, name
            assert GPU_TOLERATION in spec["tolerations"], name
        else:
            assert "nvidia.com/gpu" not in limits, name
            assert not {"nodeSelector", "tolerations"} & set(spec), name


def test_each_pod_of_a_bulk_prediction_takes_one_shard():
    """`serve predict` takes the arguments of every pod, and the shards are all of them."""
    case = "components/store-bucket,bulk-predict on local"
    (job,) = (m for m in manifests_of_kind(case, "Job") if m["metadata"]["name"] == "imago-predict")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "serve", "predict"]
    assert job["spec"]["completionMode"] == "Indexed"

    shards: set[Shard] = set()
    for index in range(job["spec"]["completions"]):
        flag = container["args"][-1].replace("$(JOB_COMPLETION_INDEX)", str(index))
        shards.add(parse_shard(flag.removeprefix("--shard=")))
    (count,) = {shard.count for shard in shards}
    assert {shard.number for shard in shards} == set(range(count))


def test_gpu_components_change_every_kind_with_pods():
    kinds: set[str] = set()
    for case in CASES:
        if "gpu" in case:
            kinds |= {name.partition("/")[0] for name, _ in pod_templates(case)}
    assert kinds == {"Deployment", "Job", "CronJob", "TrainingRuntime"}


@pytest.mark.parametrize("component", ["", "cron-training,", "training-kubeflow,"])
def test_training_is_queued_whatever_creates_it(component):
    case = f"components/{component}kueue on local"
    (queued,) = manifests_of_kind(case, "Job", "CronJob", "TrainJob")
    metadata = queued["metadata"]
    if queued["kind"] == "CronJob":
        metadata = queued["spec"]["jobTemplate"]["metadata"]
    assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == "imago"
    assert "suspend" not in queued["spec"], "each apply would stop it"
