"""Alerts, dashboard, autoscalers and analyses query existing metrics, and the alerts fire."""

import ast
import json
import re
import shutil
import subprocess
import textwrap
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from serve.http.dispatcher import image_outcome
from serve.http.openapi import OPENAPI
from serve.metrics.definitions import METRICS
from support.manifests import CASES, K8S, manifests_of_kind, render_overlay

HERE = Path(__file__).parent
RUNBOOK = (K8S / "README.md").read_text()
COMPUTED = {
    "imago_drift_psi": ("signal",),
    "imago_drift_images": (),
    "imago_feedback_accuracy": (),
    "imago_feedback_ece": (),
}  # computed by serve.metrics.derived_metrics on each scrape
TARGET = {"namespace", "pod", "job", "container"}  # added by Prometheus
JOBS = {"job_name"}  # of kube-state-metrics' series on Jobs


def series() -> dict[str, tuple[str, ...]]:
    """Return the labels of every series of the service, by name."""
    found = dict(COMPUTED)
    for name, definition in METRICS.items():
        full = f"imago_{name}"
        if definition.kind == "histogram":
            found |= {
                f"{full}_bucket": (*definition.labels, "le"),
                f"{full}_sum": definition.labels,
                f"{full}_count": definition.labels,
            }
        else:
            found[full + ("_total" if definition.kind == "counter" else "")] = definition.labels
    return found


def training() -> set[str]:
    """Return the names of the series of a training job."""
    from train.runs import monitor

    trained = monitor.Monitor(9090)
    trained._trainer = monitor.L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    return {
        family.name + ("_total" if family.type == "counter" else "") for family in trained.collect()
    }


def rules() -> list[dict]:
    (manifest,) = manifests_of_kind("components/prometheus-rules", "PrometheusRule")
    return manifest["spec"]["groups"]


def dashboard() -> dict:
    boards = manifests_of_kind("components/grafana-dashboard", "ConfigMap")
    (board,) = (m for m in boards if m["metadata"]["name"] == "imago-dashboard")
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    return json.loads(board["data"]["imago.json"])


def queries() -> dict[str, str]:
    """Return every PromQL query of the manifests by its place, with variables filled in."""
    found = {r["alert"]: r["expr"] for group in rules() for r in group["rules"]}
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "5m").replace("$namespace", "imago")
            found[f"panel {panel['title']} {target['refId']}"] = query
    (template,) = manifests_of_kind("components/canary-rollout", "AnalysisTemplate")
    for metric in template["spec"]["metrics"]:
        found[f"analysis {metric['name']}"] = re.sub(
            r"\{\{.*?\}\}", "x", metric["provider"]["prometheus"]["query"]
        )
    (scaled,) = manifests_of_kind("components/keda", "ScaledObject")
    found["keda"] = next(
        t["metadata"]["query"] for t in scaled["spec"]["triggers"] if t["type"] == "prometheus"
    )
    (adapter,) = yaml.safe_load(
        (K8S / "components/hpa/prometheus-adapter-values.yaml").read_text()
    )["rules"]["custom"]
    found["adapter"] = (
        adapter["metricsQuery"]
        .replace("<<.Series>>", "imago_pending_images")
        .replace("<<.LabelMatchers>>", 'namespace="imago"')
        .replace("<<.GroupBy>>", "pod")
    )
    found["adapter series"] = adapter["seriesQuery"]
    return found


def test_queries_use_existing_series_and_labels():
    known = series() | dict.fromkeys(training(), ())
    used = set()
    for where, query in queries().items():
        for name, selector in re.findall(r"\b(imago_\w+)(?:\{([^}]*)\})?", query):
            assert name in known, f"{where}: {name}"
            used.add(name)
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert labels <= {*known[name], *TARGET}, f"{where}: {labels}"
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
    known = label_values()
    used_labels = set()
    for where, query in queries().items():
        for name, selector in re.findall(r"\bimago_(\w+?)(?:_total)?\{([^}]*)\}", query):
            for label, _, value in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', selector):
                if label not in TARGET:
                    used_labels.add(label)
                    for one in value.split("|"):
                        assert any(re.fullmatch(one, counts) for counts in known[name]), (
                            f"{where}: {label} {one}"
                        )
    assert used_labels == {"code", "outcome"}


def test_queries_group_by_existing_labels():
    known = series() | dict.fromkeys(training(), ())
    for where, query in queries().items():
        names = set(re.findall(r"\bimago_\w+", query))
        labels = (
            {label for name in names for label in known[name]}
            | TARGET
            | (JOBS if "kube_job_" in query else set())
        )
        for grouping in re.findall(r"\bby \(([^)]*)\)", query):
            if names:
                assert {g.strip() for g in grouping.split(",")} <= labels, f"{where}: {grouping}"


def test_training_alerts_match_jobs_created_by_hand():
    made = re.findall(r"create job (\S+) --from", RUNBOOK + (K8S / "cluster").read_text())
    assert len(made) >= 2
    patterns = {
        pattern
        for query in queries().values()
        for pattern in re.findall(r'\b(?:job_name|pod)=~"(imago-train[^"]*)"', query)
    }
    assert patterns
    assert all(re.fullmatch(pattern, name) for pattern in patterns for name in made)


def test_both_autoscalers_use_the_same_metric():
    (hpa,) = manifests_of_kind("components/hpa", "HorizontalPodAutoscaler")
    (pods,) = (m["pods"] for m in hpa["spec"]["metrics"] if m["type"] == "Pods")
    (rule,) = yaml.safe_load((K8S / "components/hpa/prometheus-adapter-values.yaml").read_text())[
        "rules"
    ]["custom"]
    assert pods["metric"]["name"] == rule["name"]["matches"] == rule["seriesQuery"].split("{")[0]
    assert METRICS[pods["metric"]["name"].removeprefix("imago_")].kind == "gauge"
    (scaled,) = manifests_of_kind("components/keda", "ScaledObject")
    assert scaled["spec"]["triggers"][0]["metadata"]["threshold"] == pods["target"]["averageValue"]
    (deployment,) = manifests_of_kind("components/hpa", "Deployment")
    containers = {c["name"] for c in deployment["spec"]["template"]["spec"]["containers"]}
    assert hpa["spec"]["metrics"][1]["containerResource"]["container"] in containers
    assert scaled["spec"]["triggers"][1]["metadata"]["containerName"] in containers


def test_missing_metrics_remove_no_replica():
    (scaled,) = manifests_of_kind("components/keda", "ScaledObject")
    assert scaled["spec"]["triggers"][0]["metadata"]["ignoreNullValues"] == "false", (
        "missing series would count as no load"
    )
    assert scaled["spec"]["fallback"]["behavior"] == "currentReplicasIfHigher"


def test_the_patch_in_the_readme_changes_the_namespace_of_the_query():
    (patches,) = re.findall(r"^    (patches:\n.*?)\n\n", RUNBOOK, re.MULTILINE | re.DOTALL)
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
    deployment = next(
        d for d in manifests_of_kind(case, "Deployment") if d["metadata"]["name"] == "imago-serving"
    )
    limit = int(
        deployment["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
    )
    targets = [
        m["containerResource"]["target"]
        for hpa in manifests_of_kind(case, "HorizontalPodAutoscaler")
        for m in hpa["spec"]["metrics"]
        if m["type"] == "ContainerResource"
    ]
    targets += [
        {"type": t["metricType"], "averageValue": t["metadata"]["value"]}
        for s in manifests_of_kind(case, "ScaledObject")
        for t in s["spec"]["triggers"]
        if t["type"] == "cpu"
    ]
    wanted = (
        manifests_of_kind(case, "HorizontalPodAutoscaler", "ScaledObject")
        and case != "overlays/gpu"
    )
    assert targets == (
        [{"type": "AverageValue", "averageValue": f"{700 * limit}m"}] if wanted else []
    )


def test_each_alert_has_an_entry_in_the_runbook():
    for group in rules():
        for rule in group["rules"]:
            anchor = rule["annotations"]["runbook"].removeprefix("k8s/README.md#")
            assert anchor == rule["alert"].lower()
            section = re.search(
                rf"^### {rule['alert']}\n\n(.+?)(?=^#|\Z)", RUNBOOK, re.MULTILINE | re.DOTALL
            )
            assert section, rule["alert"]
            assert len(section[1]) > 200, rule["alert"]


def test_the_readme_lets_prometheus_select_every_monitor_and_rule():
    """By default the chart's Prometheus selects only objects of its own release."""
    kinds = {
        m["kind"]
        for case in CASES
        for m in manifests_of_kind(case, "PodMonitor", "ServiceMonitor", "PrometheusRule")
    }
    shown = set(re.findall(r"prometheusSpec\.(\w+)SelectorNilUsesHelmValues=false", RUNBOOK))
    named = {
        "PodMonitor": "podMonitor",
        "ServiceMonitor": "serviceMonitor",
        "PrometheusRule": "rule",
    }
    assert shown == {named[kind] for kind in kinds}


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    return found or pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")


def test_alerts_fire_only_when_they_should(promtool, tmp_path):
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": rules()}))
    cases = yaml.safe_load((HERE / "alerts.yaml").read_text())
    annotations = {r["alert"]: r["annotations"] for group in rules() for r in group["rules"]}
    fired = set()
    for case in cases["tests"]:
        for check in case["alert_rule_test"]:
            fired |= {check["alertname"]} if check.get("exp_alerts") else set()
    assert fired == set(annotations), "each alert has a case in which it fires"
    bare = [{**r, "annotations": {}} for group in rules() for r in group["rules"]]
    (tmp_path / "rules.yaml").write_text(
        yaml.safe_dump({"groups": [{"name": "all", "rules": bare}]})
    )
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump({**cases, "rule_files": ["rules.yaml"]}))
    result = subprocess.run(
        [promtool, "test", "rules", "cases.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_rules_and_queries_are_promql(promtool, tmp_path):
    recorded = [{"record": f"q:{i}", "expr": query} for i, query in enumerate(queries().values())]
    (tmp_path / "rules.yaml").write_text(
        yaml.safe_dump({"groups": [*rules(), {"name": "queries", "rules": recorded}]})
    )
    result = subprocess.run(
        [promtool, "check", "rules", "rules.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
