"""The analysis of a canary: verdicts on errors, latency and agreement."""

import re
import shutil
import subprocess

import pytest
import yaml

from serve.metrics.definitions import DURATION_BUCKETS_SECONDS
from support.manifests import CASES, manifests_of_kind

SHADOW = 'imago_shadow_images_total{namespace="imago",pod="imago-serving-new-a",outcome="%s"}'
OLD_SHADOW = SHADOW.replace("-new-", "-old-")
MODEL = (
    'imago_model_info{namespace="imago",pod="%s",name="digits",version="%s",'
    'variant="fp32",digest="%s"}'
)
TWO_VERSIONS = {
    MODEL % ("imago-serving-old-a", 1, "d1"): "1x20",
    MODEL % ("imago-serving-new-a", 2, "d2"): "1x20",
}
ONE_VERSION = {
    MODEL % ("imago-serving-old-a", 1, "d1"): "1x20",
    MODEL % ("imago-serving-new-a", 1, "d1"): "1x20",
}
OTHER_NAMESPACE = {(MODEL % ("imago-serving-z", 9, "d9")).replace('"imago"', '"team"'): "1x20"}


def analysis() -> dict[str, dict]:
    """Return the metrics of the analysis by name."""
    (template,) = manifests_of_kind("components/canary-rollout", "AnalysisTemplate")
    return {metric["name"]: metric for metric in template["spec"]["metrics"]}


@pytest.mark.parametrize(
    ("series", "value", "verdict"),
    [
        (
            TWO_VERSIONS | {SHADOW % "agree": "0+98x20", SHADOW % "disagree": "0+2x20"},
            0.98,
            "successful",
        ),
        (
            TWO_VERSIONS | {SHADOW % "agree": "0+90x20", SHADOW % "disagree": "0+10x20"},
            0.9,
            "failed",
        ),
        (TWO_VERSIONS | {SHADOW % "disagree": "0+10x20"}, 0, "failed"),
        (TWO_VERSIONS | {SHADOW % "agree": "10x20"}, -1, "inconclusive"),
        (
            TWO_VERSIONS | {SHADOW % "dropped": "0+10x20", OLD_SHADOW % "agree": "0+10x20"},
            -1,
            "inconclusive",
        ),
        (TWO_VERSIONS, -1, "inconclusive"),
        (ONE_VERSION | OTHER_NAMESPACE, None, "successful"),
        ({}, None, "successful"),
    ],
    ids=[
        "agrees",
        "disagrees",
        "never agrees",
        "no traffic now",
        "too busy",
        "no shadow",
        "one version",
        "nothing",
    ],
)
def test_agreement_without_comparisons_is_inconclusive(series, value, verdict, tmp_path):
    promtool = shutil.which("promtool") or pytest.skip(
        "promtool is not installed (Debian: apt-get install prometheus)"
    )
    metric = analysis()["agreement"]
    query = metric["provider"]["prometheus"]["query"]
    query = query.replace("{{args.namespace}}", "imago").replace("{{args.hash}}", "new")
    samples = [] if value is None else [{"labels": "{}", "value": value}]
    case = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f"round({query}, 0.001)",
                "eval_time": "15m",
                "exp_samples": samples,
            }
        ],
    }
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump({"rule_files": [], "tests": [case]}))
    result = subprocess.run(
        [promtool, "test", "rules", "cases.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert judge(metric, [] if value is None else [value]) == verdict


def judge(metric: dict, result: list[float]) -> str:
    """Judge a measurement like Argo Rollouts: inconclusive where neither condition holds."""
    is_success = holds(metric["successCondition"], result)
    is_failure = holds(metric["failureCondition"], result)
    assert not (is_success and is_failure)
    if is_success:
        return "successful"
    return "failed" if is_failure else "inconclusive"


def holds(condition: str, result: list[float]) -> bool:
    """Evaluate a condition of an analysis as Python."""
    return eval(condition.replace("||", "or").replace("&&", "and"), {"result": result})


@pytest.mark.parametrize("case", [c for c in CASES if "canary-rollout" in c])
def test_the_rollout_passes_the_arguments_of_the_analysis(case):
    (template,) = manifests_of_kind(case, "AnalysisTemplate")
    (rollout,) = manifests_of_kind(case, "Rollout")
    assert list(analysis()) == ["errors", "p99", "agreement"], (
        "the component shows how to remove the last one"
    )
    canary = rollout["spec"]["strategy"]["canary"]["analysis"]
    assert canary["templates"] == [{"templateName": template["metadata"]["name"]}]

    declared = {argument["name"] for argument in template["spec"]["args"]}
    required = {arg["name"] for arg in template["spec"]["args"] if "value" not in arg}
    used = set(re.findall(r"\{\{args\.(\w+)\}\}", yaml.safe_dump(template)))
    assert used == declared
    assert {argument["name"] for argument in canary["args"]} == required


def test_thresholds_of_latency_are_edges_of_the_histogram():
    """Between two edges a quantile is interpolated."""
    (manifest,) = manifests_of_kind("components/prometheus-rules", "PrometheusRule")
    rules = [rule for group in manifest["spec"]["groups"] for rule in group["rules"]]
    (slow,) = (rule for rule in rules if rule["alert"] == "ImagoSlow")
    (of_alert,) = re.findall(r"> ([\d.]+)$", slow["expr"].strip())
    (of_analysis,) = re.findall(r"< ([\d.]+)$", analysis()["p99"]["successCondition"])
    assert {float(of_alert), float(of_analysis)} <= set(DURATION_BUCKETS_SECONDS)
