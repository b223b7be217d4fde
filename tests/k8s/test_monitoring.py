"""Alerts, dashboard, autoscalers and analyses query existing metrics, and the alerts fire."""

import ast
import json
import re
import shutil
import subprocess
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from serve.http.dispatcher import image_outcome
from serve.http.openapi import OPENAPI
from serve.metrics.definitions import METRICS
from support.manifests import CASES, K8S, manifests_of_kind, pod_templates, render_overlay
from support.server import find_free_ports

ALERT_CASES = Path(__file__).parent / "alerts.yaml"
RUNBOOK = (K8S / "README.md").read_text()
# Computed by serve.metrics.derived_metrics on each scrape.
DERIVED = {
    "imago_drift_psi": ("signal",),
    "imago_drift_images": (),
    "imago_feedback_accuracy": (),
    "imago_feedback_ece": (),
}
TARGET_LABELS = {"namespace", "pod", "job", "container"}  # added by Prometheus
JOB_LABELS = {"job_name"}  # of kube-state-metrics' series on Jobs


def serving_series() -> dict[str, tuple[str, ...]]:
    """Return the labels of every series of the service, by name."""
    labels = dict(DERIVED)
    for name, definition in METRICS.items():
        if definition.kind == "histogram":
            labels[f"imago_{name}_bucket"] = (*definition.labels, "le")
            labels[f"imago_{name}_sum"] = definition.labels
            labels[f"imago_{name}_count"] = definition.labels
        elif definition.kind == "counter":
            labels[f"imago_{name}_total"] = definition.labels
        else:
            labels[f"imago_{name}"] = definition.labels
    return labels


def training_series() -> set[str]:
    """Return the names of the series of a training job."""
    from train.runs.monitor import Monitor
    from train.runs.trainer import ImageTrainer

    (port,) = find_free_ports(1)
    monitor = Monitor(port, "127.0.0.1")
    monitor.start(
        ImageTrainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    )
    suffixes = {"counter": "_total"}
    return {family.name + suffixes.get(family.type, "") for family in monitor.collect()}


def all_series() -> dict[str, tuple[str, ...]]:
    """Return the labels of every series of the service and of a training job, by name."""
    return serving_series() | dict.fromkeys(training_series(), ())


def rule_groups() -> list[dict]:
    (manifest,) = manifests_of_kind("components/prometheus-rules", "PrometheusRule")
    return manifest["spec"]["groups"]


def alerts() -> dict[str, dict]:
    """Return the alerts by name."""
    rules: dict[str, dict] = {}
    for group in rule_groups():
        for rule in group["rules"]:
            rules[rule["alert"]] = rule
    return rules


def adapter_rule() -> dict:
    """Return the only rule of prometheus-adapter."""
    values = yaml.safe_load((K8S / "components/hpa/prometheus-adapter-values.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    return rule


def dashboard() -> dict:
    boards = manifests_of_kind("components/grafana-dashboard", "ConfigMap")
    (board,) = (m for m in boards if m["metadata"]["name"] == "imago-dashboard")
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    return json.loads(board["data"]["imago.json"])


def queries() -> dict[str, str]:
    """Return every PromQL query of the manifests by its source, with variables filled in."""
    by_source = {name: rule["expr"] for name, rule in alerts().items()}
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "5m").replace("$namespace", "imago")
            by_source[f"panel {panel['title']} {target['refId']}"] = query

    (template,) = manifests_of_kind("components/canary-rollout", "AnalysisTemplate")
    for metric in template["spec"]["metrics"]:
        query = metric["provider"]["prometheus"]["query"]
        by_source[f"analysis {metric['name']}"] = re.sub(r"\{\{.*?\}\}", "x", query)

    (scaled_object,) = manifests_of_kind("components/keda", "ScaledObject")
    by_source["keda"] = scaled_object["spec"]["triggers"][0]["metadata"]["query"]

    adapter = adapter_rule()
    by_source["adapter series"] = adapter["seriesQuery"]
    by_source["adapter"] = (
        adapter["metricsQuery"]
        .replace("<<.Series>>", "imago_pending_images")
        .replace("<<.LabelMatchers>>", 'namespace="imago"')
        .replace("<<.GroupBy>>", "pod")
    )
    return by_source


def test_queries_use_existing_series_and_labels():
    series = all_series()
    used = set()
    for source, query in queries().items():
        for name, selector in re.findall(r"\b(imago_\w+)(?:\{([^}]*)\})?", query):
            assert name in series, f"{source}: {name}"
            used.add(name)
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert labels <= {*series[name], *TARGET_LABELS}, f"{source}: {labels}"
    assert len(used) > 15


def label_values() -> dict[str, set[str]]:
    """Return the label values of each metric, from the OpenAPI document and the calls of `add`."""
    values: defaultdict[str, set[str]] = defaultdict(set)
    for operations in OPENAPI["paths"].values():
        for operation in operations.values():
            values["requests"] |= set(operation["responses"])
    values["images"] = {image_outcome(status) for status in (0, 200, 422, 500)}

    for path in (K8S.parent / "serve").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            is_add = isinstance(call, ast.Call) and getattr(call.func, "attr", None) == "add"
            if not is_add or not call.args:
                continue
            metric, *labels = call.args
            if isinstance(metric, ast.Constant) and isinstance(metric.value, str):
                for label in labels:
                    values[metric.value] |= string_constants(label)
    return values


def string_constants(node: ast.AST) -> set[str]:
    constants = (child.value for child in ast.walk(node) if isinstance(child, ast.Constant))
    return {value for value in constants if isinstance(value, str)}


def test_queries_use_existing_label_values():
    known_values = label_values()
    used_labels = set()
    for source, query in queries().items():
        for name, label, value in label_matchers(query):
            used_labels.add(label)
            for pattern in value.split("|"):
                matches = [known for known in known_values[name] if re.fullmatch(pattern, known)]
                assert matches, f"{source}: {label} {pattern}"
    assert used_labels == {"code", "outcome"}


def label_matchers(query: str) -> Iterator[tuple[str, str, str]]:
    """Yield metric, label and value of each condition, but those on labels of the target."""
    for name, selector in re.findall(r"\bimago_(\w+?)(?:_total)?\{([^}]*)\}", query):
        for label, value in re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"', selector):
            if label not in TARGET_LABELS:
                yield name, label, value


def test_queries_group_by_existing_labels():
    series = all_series()
    for source, query in queries().items():
        names = set(re.findall(r"\bimago_\w+", query))
        if not names:
            continue
        labels = TARGET_LABELS.union(*(series[name] for name in names))
        if "kube_job_" in query:
            labels |= JOB_LABELS
        for grouping in re.findall(r"\bby \(([^)]*)\)", query):
            assert set(re.split(r"\s*,\s*", grouping)) <= labels, f"{source}: {grouping}"


def test_training_alerts_match_jobs_created_by_hand():
    names = re.findall(r"create job (\S+) --from", RUNBOOK + (K8S / "cluster").read_text())
    assert len(names) >= 2
    all_queries = "\n".join(queries().values())
    patterns = set(re.findall(r'\b(?:job_name|pod)=~"(imago-train[^"]*)"', all_queries))
    assert patterns
    for pattern in patterns:
        assert all(re.fullmatch(pattern, name) for name in names), pattern


def test_both_autoscalers_use_the_same_metric():
    (hpa,) = manifests_of_kind("components/hpa", "HorizontalPodAutoscaler")
    pods_metric, cpu_metric = hpa["spec"]["metrics"]
    (scaled_object,) = manifests_of_kind("components/keda", "ScaledObject")
    pods_trigger, cpu_trigger = scaled_object["spec"]["triggers"]

    name = pods_metric["pods"]["metric"]["name"]
    assert METRICS[name.removeprefix("imago_")].kind == "gauge"
    assert adapter_rule()["name"]["matches"] == name
    assert adapter_rule()["seriesQuery"].startswith(name + "{")
    target = pods_metric["pods"]["target"]["averageValue"]
    assert pods_trigger["metadata"]["threshold"] == target

    (deployment,) = manifests_of_kind("components/hpa", "Deployment")
    containers = {c["name"] for c in deployment["spec"]["template"]["spec"]["containers"]}
    assert cpu_metric["containerResource"]["container"] in containers
    assert cpu_trigger["metadata"]["containerName"] in containers


def test_missing_metrics_remove_no_replica():
    (scaled,) = manifests_of_kind("components/keda", "ScaledObject")
    assert scaled["spec"]["triggers"][0]["metadata"]["ignoreNullValues"] == "false", (
        "missing series would count as no load"
    )
    assert scaled["spec"]["fallback"]["behavior"] == "currentReplicasIfHigher"


def test_the_patch_in_the_readme_changes_the_namespace_of_the_query():
    blocks = re.findall(r"^    (patches:\n.*?)\n\n", RUNBOOK, re.MULTILINE | re.DOTALL)
    (patches,) = (block for block in blocks if "ScaledObject" in block)
    manifests = render_overlay(
        "kind: Kustomization\nnamespace: team\nresources: [../local]\n"
        "components: [../../components/keda]\n" + textwrap.dedent("    " + patches)
    )
    (scaled,) = (m for m in manifests if m["kind"] == "ScaledObject")
    query = scaled["spec"]["triggers"][0]["metadata"]["query"]
    (standard,) = manifests_of_kind("components/keda", "ScaledObject")
    assert query == standard["spec"]["triggers"][0]["metadata"]["query"].replace('imago"', 'team"')


@pytest.mark.parametrize("case", CASES)
def test_autoscalers_target_seventy_percent_of_the_cpu_limit(case):
    targets: list[tuple[str, str]] = []
    for hpa in manifests_of_kind(case, "HorizontalPodAutoscaler"):
        for metric in hpa["spec"]["metrics"]:
            if metric["type"] == "ContainerResource":
                target = metric["containerResource"]["target"]
                targets.append((target["type"], target["averageValue"]))
    for scaled_object in manifests_of_kind(case, "ScaledObject"):
        for trigger in scaled_object["spec"]["triggers"]:
            if trigger["type"] == "cpu":
                targets.append((trigger["metricType"], trigger["metadata"]["value"]))

    template = dict(pod_templates(case))["Deployment/imago-serving"]
    limit = int(template["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    has_autoscaler = manifests_of_kind(case, "HorizontalPodAutoscaler", "ScaledObject")
    if has_autoscaler and case != "overlays/gpu":
        assert targets == [("AverageValue", f"{700 * limit}m")]
    else:
        assert targets == []


def test_each_alert_has_an_entry_in_the_runbook():
    for name, rule in alerts().items():
        anchor = rule["annotations"]["runbook"].removeprefix("k8s/README.md#")
        assert anchor == name.lower()
        pattern = rf"^### {name}\n\n(.+?)(?=^#|\Z)"
        section = re.search(pattern, RUNBOOK, re.MULTILINE | re.DOTALL)
        assert section, name
        assert len(section[1]) > 200, name


def test_the_readme_lets_prometheus_select_every_monitor_and_rule():
    """By default the chart's Prometheus selects only objects of the chart's release."""
    assert manifests_of_kind("components/pod-monitor", "PodMonitor")
    assert manifests_of_kind("components/service-monitor", "ServiceMonitor")
    assert manifests_of_kind("components/prometheus-rules", "PrometheusRule")
    selectors = re.findall(r"prometheusSpec\.(\w+)SelectorNilUsesHelmValues=false", RUNBOOK)
    assert set(selectors) == {"podMonitor", "serviceMonitor", "rule"}


@pytest.fixture
def promtool() -> str:
    path = shutil.which("promtool")
    return path or pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")


def test_alerts_fire_only_when_they_should(promtool, tmp_path):
    cases = yaml.safe_load(ALERT_CASES.read_text())
    fired = set()
    for case in cases["tests"]:
        for check in case["alert_rule_test"]:
            if check.get("exp_alerts"):
                fired.add(check["alertname"])
    assert fired == alerts().keys(), "each alert has a case in which it fires"

    # The cases do not repeat the annotations.
    rules = [rule | {"annotations": {}} for rule in alerts().values()]
    groups = [{"name": "all", "rules": rules}]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": groups}))
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump({**cases, "rule_files": ["rules.yaml"]}))
    result = subprocess.run(
        [promtool, "test", "rules", "cases.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_rules_and_queries_are_promql(promtool, tmp_path):
    recorded = [{"record": f"q:{i}", "expr": query} for i, query in enumerate(queries().values())]
    groups = [*rule_groups(), {"name": "queries", "rules": recorded}]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": groups}))
    result = subprocess.run(
        [promtool, "check", "rules", "rules.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
