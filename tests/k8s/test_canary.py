"""The analysis of a canary: verdicts on errors, latency and agreement."""

import re
import shutil
import subprocess

import pytest
import yaml

from serve.metrics.definitions import DURATION_BUCKETS_SECONDS
from support.manifests import CASES, manifests_of_kind

SHADOW = 'imago_shadow_images_total{namespace="imago",pod="imago-serving-new-a",outcome="%s"}'
OTHERS = SHADOW.replace("-new-", "-old-")
MODEL = (
    'imago_model_info{namespace="imago",pod="%s",name="digits",version="%s",'
    'variant="fp32",digest="%s"}'
)
TWO = {
    MODEL % ("imago-serving-old-a", 1, "d1"): "1x20",
    MODEL % ("imago-serving-new-a", 2, "d2"): "1x20",
}
ONE = {
    MODEL % ("imago-serving-old-a", 1, "d1"): "1x20",
    MODEL % ("imago-serving-new-a", 1, "d1"): "1x20",
}
ELSEWHERE = {(MODEL % ("imago-serving-z", 9, "d9")).replace('"imago"', '"team"'): "1x20"}


def analysis() -> dict[str, dict]:
    (template,) = manifests_of_kind("components/canary-rollout", "AnalysisTemplate")
    return {metric["name"]: metric for metric in template["spec"]["metrics"]}


@pytest.mark.parametrize(
    ("series", "value", "verdict"),
    [
        (TWO | {SHADOW % "agree": "0+98x20", SHADOW % "disagree": "0+2x20"}, 0.98, "well"),
        (TWO | {SHADOW % "agree": "0+90x20", SHADOW % "disagree": "0+10x20"}, 0.9, "wrong"),
        (TWO | {SHADOW % "disagree": "0+10x20"}, 0, "wrong"),
        (TWO | {SHADOW % "agree": "10x20"}, -1, "inconclusive"),
        (TWO | {SHADOW % "dropped": "0+10x20", OTHERS % "agree": "0+10x20"}, -1, "inconclusive"),
        (TWO, -1, "inconclusive"),
        (ONE | ELSEWHERE, None, "well"),
        ({}, None, "well"),
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
    (tmp_path / "cases.yaml").write_text(
        yaml.safe_dump(
            {
                "rule_files": [],
                "tests": [
                    {
                        "interval": "1m",
                        "input_series": [
                            {"series": name, "values": values} for name, values in series.items()
                        ],
                        "promql_expr_test": [
                            {
                                "expr": f"round({query}, 0.001)",
                                "eval_time": "15m",
                                "exp_samples": []
                                if value is None
                                else [{"labels": "{}", "value": value}],
                            }
                        ],
                    }
                ],
            }
        )
    )
    result = subprocess.run(
        [promtool, "test", "rules", "cases.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert judged(metric, [] if value is None else [value]) == verdict


def judged(metric: dict, result: list[float]) -> str:
    """Judge a measurement like Argo Rollouts: inconclusive where neither condition holds."""
    well, wrong = (
        eval(
            metric[f"{name}Condition"].replace("||", "or").replace("&&", "and"), {"result": result}
        )
        for name in ("success", "failure")
    )
    assert not (well and wrong)
    return "well" if well else "wrong" if wrong else "inconclusive"


@pytest.mark.parametrize("case", [c for c in CASES if "canary-rollout" in c])
def test_the_rollout_passes_the_arguments_of_the_analysis(case):
    (template,), (rollout,) = (
        manifests_of_kind(case, "AnalysisTemplate"),
        manifests_of_kind(case, "Rollout"),
    )
    assert list(analysis()) == ["errors", "p99", "agreement"], (
        "the component says how to take the last one out"
    )
    given = rollout["spec"]["strategy"]["canary"]["analysis"]
    assert given["templates"] == [{"templateName": template["metadata"]["name"]}]
    declared = {argument["name"]: argument for argument in template["spec"]["args"]}
    supplied = {argument["name"] for argument in given["args"]}
    assert set(re.findall(r"\{\{args\.(\w+)\}\}", yaml.safe_dump(template))) == declared.keys()
    assert (
        {name for name, argument in declared.items() if "value" not in argument}
        == supplied
        <= declared.keys()
    )


def test_thresholds_of_latency_are_edges_of_the_histogram():
    """Between two edges a quantile is interpolated."""
    (rule,) = (
        r
        for m in manifests_of_kind("components/prometheus-rules", "PrometheusRule")
        for g in m["spec"]["groups"]
        for r in g["rules"]
        if r["alert"] == "ImagoSlow"
    )
    asked = [
        re.findall(r"> ([\d.]+)$", rule["expr"].strip()),
        re.findall(r"< ([\d.]+)$", analysis()["p99"]["successCondition"]),
    ]
    for (threshold,) in asked:
        assert float(threshold) in DURATION_BUCKETS_SECONDS
