"""A Kubernetes API server for kubectl: it keeps objects with the defaults of the real one.

It answers discovery, GET, POST and PATCH, and validates nothing. The defaults are those of
Kubernetes 1.36 (pkg/apis/*/v1/defaults.go), and of the definitions of the Gateway API 1.6 and
Kubeflow Trainer 2.3, for the fields that the manifests use. Quantities are written as the server
writes them.
"""

import contextlib
import copy
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import ROUND_UP, Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from support.manifests import Manifest

CLUSTER_KINDS = ("Namespace", "PersistentVolume")
# The number of a unit, the larger first.
BINARY_UNITS = {unit: 1024**power for power, unit in ((4, "Ti"), (3, "Gi"), (2, "Mi"), (1, "Ki"))}
DECIMAL_UNITS = {
    unit: Decimal(10) ** power
    for power, unit in ((12, "T"), (9, "G"), (6, "M"), (3, "k"), (0, ""), (-3, "m"))
}


@dataclass
class ApiServer:
    """A running server. `patches` holds the body of each PATCH, by the path of its object."""

    url: str
    kinds: dict[tuple[str, str], str] = field(default_factory=dict)  # (apiVersion, plural) -> kind
    objects: dict[str, Manifest] = field(default_factory=dict)
    patches: dict[str, str] = field(default_factory=dict)

    def add_kinds(self, manifests: list[Manifest]) -> None:
        """Let the server know the kinds of these manifests."""
        for manifest in manifests:
            kind = manifest["kind"]
            self.kinds[manifest["apiVersion"], plural(kind)] = kind

    def write_kubeconfig(self, path: Path) -> None:
        """Write a kubectl configuration that names this server."""
        configuration = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "users": [{"name": "test", "user": {}}],
        }
        path.write_text(json.dumps(configuration))

    def discover(self, path: str) -> Manifest | None:
        """Return the answer to a discovery request; None where the path is of none."""
        versions = {api_version for api_version, _ in self.kinds}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            groups = [_group(version) for version in sorted(versions) if "/" in version]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}

        version = path.removeprefix("/apis/").removeprefix("/api/")
        if version not in versions:
            return None
        resources: list[Manifest] = []
        for (api_version, name), kind in self.kinds.items():
            if api_version == version:
                resources.append(
                    {
                        "name": name,
                        "kind": kind,
                        "namespaced": kind not in CLUSTER_KINDS,
                        "verbs": ["create", "get", "list", "patch"],
                    }
                )
        return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}


def plural(kind: str) -> str:
    """Return the name of a kind's resource, e.g. networkpolicies."""
    name = kind.lower()
    if name.endswith("y"):
        return name[:-1] + "ies"
    return name + ("es" if name.endswith("s") else "s")


def _group(api_version: str) -> Manifest:
    group, _, version = api_version.partition("/")
    named = {"groupVersion": api_version, "version": version}
    return {"name": group, "versions": [named], "preferredVersion": named}


@contextlib.contextmanager
def api_server() -> Iterator[ApiServer]:
    """Run a server without objects within the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            self.answer(server.discover(path) or server.objects.get(path))

        def do_POST(self) -> None:
            manifest = json.loads(self.read_body())
            path = f"{self.path.partition('?')[0]}/{manifest['metadata']['name']}"
            server.objects[path] = with_defaults(manifest)
            self.answer(server.objects[path], status=201)

        def do_PATCH(self) -> None:
            path = self.path.partition("?")[0]
            patch = self.read_body().decode()
            if "dryRun" in self.path:
                self.answer(_merge(server.objects[path], json.loads(patch)))
                return
            server.patches[path] = patch
            self.answer(server.objects[path])

        def read_body(self) -> bytes:
            return self.rfile.read(int(self.headers["Content-Length"]))

        def answer(self, content: Manifest | None, status: int = 200) -> None:
            if content is None:
                status = 404
                content = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404}
                content["reason"] = "NotFound"
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Print nothing."""

    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = ApiServer(f"http://127.0.0.1:{http_server.server_port}")
    thread = threading.Thread(target=http_server.serve_forever, daemon=True)
    thread.start()
    yield server
    http_server.shutdown()
    http_server.server_close()
    thread.join()


def _merge(kept: Any, patch: Any) -> Any:
    """Return an object with the fields of a patch; lists are replaced."""
    if not isinstance(kept, dict) or not isinstance(patch, dict):
        return patch
    merged = dict(kept)
    for name, value in patch.items():
        merged[name] = _merge(kept.get(name), value)
    return merged


def canonical_quantity(text: str | int | float) -> str:
    """Return a quantity as the server writes it: the largest unit that gives an integer.

    Examples: 1000m -> 1, 0.5Gi -> 512Mi, 0.1 -> 100m. Only a binary unit gives a binary unit.
    """
    unit = str(text).lstrip("0123456789.")
    number = Decimal(str(text).removesuffix(unit))
    if unit in BINARY_UNITS:
        value = number * BINARY_UNITS[unit]
        for name, factor in BINARY_UNITS.items():
            if value and value % factor == 0:
                return f"{int(value / factor)}{name}"
        return str(int(value.to_integral_value(ROUND_UP)))

    value = number * DECIMAL_UNITS[unit]
    for name, unit_value in DECIMAL_UNITS.items():
        if value and value % unit_value == 0:
            return f"{int(value / unit_value)}{name}"
    return "0"


def with_defaults(manifest: Manifest) -> Manifest:
    """Return the object that the server keeps for a manifest."""
    kept = copy.deepcopy(manifest)
    kept["metadata"] |= {"uid": "0", "resourceVersion": "1", "creationTimestamp": "2026-01-01"}
    spec = kept.get("spec", {})
    match kept["kind"]:
        case "Namespace":
            kept["metadata"].setdefault("labels", {}).setdefault(
                "kubernetes.io/metadata.name", kept["metadata"]["name"]
            )
            kept["spec"] = {"finalizers": ["kubernetes"]}
        case "Deployment":
            _complete_deployment(spec)
        case "Job":
            _complete_job(spec)
        case "CronJob":
            _set_missing(spec, suspend=False)
            _complete_job(spec["jobTemplate"]["spec"])
        case "Service":
            _complete_service(spec)
        case "PersistentVolume" | "PersistentVolumeClaim":
            _complete_storage(spec)
        case "HorizontalPodAutoscaler":
            _complete_autoscaler(spec)
        case "NetworkPolicy":
            _complete_network_policy(spec)
        case "HTTPRoute":
            _complete_route(spec)
        case "TrainingRuntime":
            _complete_training_runtime(spec)
        case "TrainJob":
            _set_missing(spec, suspend=False, managedBy="trainer.kubeflow.org/trainjob-controller")
    return kept


def _set_missing(target: dict[str, Any], **defaults: Any) -> None:
    for name, value in defaults.items():
        target.setdefault(name, value)


def _normalize_quantities(target: dict[str, Any], *names: str) -> None:
    for name in names:
        if name in target:
            target[name] = canonical_quantity(target[name])


def _complete_deployment(spec: dict[str, Any]) -> None:
    _set_missing(spec, replicas=1, revisionHistoryLimit=10, progressDeadlineSeconds=600)
    strategy = spec.setdefault("strategy", {})
    _set_missing(strategy, type="RollingUpdate")
    if strategy["type"] == "RollingUpdate":
        rolling = strategy.setdefault("rollingUpdate", {})
        _set_missing(rolling, maxUnavailable="25%", maxSurge="25%")
    _complete_pod(spec["template"]["spec"])


def _complete_job(spec: dict[str, Any]) -> None:
    _set_missing(spec, completions=1, parallelism=1, completionMode="NonIndexed", suspend=False)
    _set_missing(spec, podReplacementPolicy="TerminatingOrFailed")
    _set_missing(spec, backoffLimit=2147483647 if "backoffLimitPerIndex" in spec else 6)
    for rule in spec.get("podFailurePolicy", {}).get("rules", []):
        for condition in rule.get("onPodConditions", []):
            _set_missing(condition, status="True")
    spec["selector"] = {"matchLabels": {"batch.kubernetes.io/controller-uid": "0"}}
    labels = spec["template"].setdefault("metadata", {}).setdefault("labels", {})
    labels["batch.kubernetes.io/controller-uid"] = "0"
    _complete_pod(spec["template"]["spec"])


def _complete_pod(spec: dict[str, Any]) -> None:
    _set_missing(spec, restartPolicy="Always", dnsPolicy="ClusterFirst", securityContext={})
    _set_missing(spec, schedulerName="default-scheduler", terminationGracePeriodSeconds=30)
    if "serviceAccountName" in spec:
        _set_missing(spec, serviceAccount=spec["serviceAccountName"])
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        _complete_container(container)
    for volume in spec.get("volumes", []):
        for source in ("configMap", "secret", "projected"):
            if source in volume:
                _set_missing(volume[source], defaultMode=420)
        if "hostPath" in volume:
            _set_missing(volume["hostPath"], type="")
        _normalize_quantities(volume.get("emptyDir", {}), "sizeLimit")


def _complete_container(container: dict[str, Any]) -> None:
    is_latest = ":" not in container["image"] or container["image"].endswith(":latest")
    _set_missing(container, imagePullPolicy="Always" if is_latest else "IfNotPresent")
    _set_missing(container, terminationMessagePath="/dev/termination-log", resources={})
    _set_missing(container, terminationMessagePolicy="File")
    for port in container.get("ports", []):
        _set_missing(port, protocol="TCP")

    resources = container["resources"]
    if "limits" in resources:
        resources["requests"] = {**resources["limits"], **resources.get("requests", {})}
    for amounts in resources.values():
        _normalize_quantities(amounts, *amounts)

    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        if name in container:
            probe = container[name]
            _set_missing(probe, timeoutSeconds=1, periodSeconds=10)
            _set_missing(probe, successThreshold=1, failureThreshold=3)
            _set_missing(probe["httpGet"], scheme="HTTP", path="/")
    for variable in container.get("env", []):
        reference = variable.get("valueFrom", {}).get("fieldRef")
        if reference is not None:
            _set_missing(reference, apiVersion="v1")


def _complete_service(spec: dict[str, Any]) -> None:
    _set_missing(spec, type="ClusterIP", clusterIP="10.0.0.1", clusterIPs=["10.0.0.1"])
    _set_missing(spec, sessionAffinity="None", internalTrafficPolicy="Cluster")
    _set_missing(spec, ipFamilies=["IPv4"], ipFamilyPolicy="SingleStack")
    for port in spec["ports"]:
        _set_missing(port, protocol="TCP", targetPort=port["port"])


def _complete_storage(spec: dict[str, Any]) -> None:
    _set_missing(spec, volumeMode="Filesystem", storageClassName="standard", volumeName="pvc-0")
    _normalize_quantities(spec.get("capacity", {}), "storage")
    _normalize_quantities(spec.get("resources", {}).get("requests", {}), "storage")


def _complete_autoscaler(spec: dict[str, Any]) -> None:
    _set_missing(spec, minReplicas=1)
    for metric in spec["metrics"]:
        for name in ("pods", "containerResource", "resource"):
            target = metric.get(name, {}).get("target", {})
            _normalize_quantities(target, "averageValue", "value")
    for direction in spec.get("behavior", {}).values():
        _set_missing(direction, selectPolicy="Max")


def _complete_network_policy(spec: dict[str, Any]) -> None:
    _set_missing(spec, policyTypes=["Ingress", *(["Egress"] if "egress" in spec else [])])
    for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
        for port in rule.get("ports", []):
            _set_missing(port, protocol="TCP")


def _complete_route(spec: dict[str, Any]) -> None:
    for parent in spec["parentRefs"]:
        _set_missing(parent, group="gateway.networking.k8s.io", kind="Gateway")
    for rule in spec["rules"]:
        for backend in rule["backendRefs"]:
            _set_missing(backend, group="", kind="Service", weight=1)


def _complete_training_runtime(spec: dict[str, Any]) -> None:
    for job in spec["template"]["spec"]["replicatedJobs"]:
        _set_missing(job, groupName="default", replicas=1)
        for container in job["template"]["spec"]["template"]["spec"]["containers"]:
            for port in container.get("ports", []):
                _set_missing(port, protocol="TCP")
