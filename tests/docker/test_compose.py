"""docker/compose.yaml: what it mounts exists, and Prometheus gets the rules of the cluster."""

import re
import subprocess

import pytest
import yaml

from serve import options
from support import ROOT

DOCKER = ROOT / "docker"
RULES = "k8s/components/prometheus-rules/rules.yaml"


@pytest.fixture(scope="module")
def services() -> dict[str, dict]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]


def mounts(service: dict) -> list[tuple[str, str]]:
    """Return (source, target) of each volume."""
    return [tuple(volume.split(":")[:2]) for volume in service.get("volumes", [])]


def test_mounted_files_exist(services):
    sources: set[str] = set()
    for service in services.values():
        for source, _ in mounts(service):
            if source.startswith("."):
                assert (DOCKER / source).is_file(), source
                sources.add(source)
    assert f"../{RULES}" in sources
    assert "../k8s/components/grafana-dashboard/imago.json" in sources


def test_prometheus_reads_the_rules_of_the_cluster(services):
    """Its command takes them out of the PrometheusRule."""
    (command,) = services["prometheus"]["command"]
    extract, _, _ = command.partition(" >/prometheus")
    extract = extract.replace("$$", "$").replace("/etc/imago/rules.yaml", str(ROOT / RULES))
    text = subprocess.run(["sh", "-c", extract], capture_output=True, text=True, check=True).stdout
    custom_resource = yaml.safe_load((ROOT / RULES).read_text())
    assert yaml.safe_load(text) == {"groups": custom_resource["spec"]["groups"]}


def test_prometheus_scrapes_the_ports_of_both_containers(services):
    config = yaml.safe_load((DOCKER / "monitoring/prometheus.yaml").read_text())
    (job,) = config["scrape_configs"]
    targets = [target for group in job["static_configs"] for target in group["targets"]]
    assert targets == ["serve:9090", "train:9090"]
    assert "--monitor.port=9090" in services["train"]["command"]
    environment = services["serve"]["environment"]
    names = {name.removeprefix("IMAGO_").lower(): value for name, value in environment.items()}
    assert options.parse_settings(names | {"model": "digits"}).metrics_port == 9090


def test_grafana_is_provisioned_from_the_mounted_files(services):
    targets = dict(mounts(services["grafana"]))
    (source,) = yaml.safe_load((DOCKER / "monitoring/datasource.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((DOCKER / "monitoring/dashboards.yaml").read_text())["providers"]
    dashboard = targets["../k8s/components/grafana-dashboard/imago.json"]
    assert dashboard.startswith(provider["options"]["path"])


def test_containers_of_imago_are_restricted_and_share_the_store(services):
    for name in ("train", "serve"):
        service = services[name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert ("store", "/store") in mounts(service)
        assert re.fullmatch(rf".*/imago-{name}:\$\{{TAG:-[\d.]+\}}", service["image"])
