"""The table in docker/README.md lists the packages of the serving image and their licences."""

import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DOCKER = Path(__file__).parents[2] / "docker"
SECTION = (
    (DOCKER / "README.md").read_text().partition("Licences of what is installed for serving:")[2]
)
IMAGE = {
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "os_name": "posix",
    "python_version": "3.11",
    "python_full_version": "3.11.2",
}


def installed(lock: str) -> set[str]:
    """Return the packages of a lock file that an image contains."""
    packages = set()
    for line in re.findall(r"^[a-z].*?(?= \\$|$)", (DOCKER / lock).read_text(), re.MULTILINE):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(IMAGE):
            packages.add(canonicalize_name(requirement.name))
    return packages


def table() -> dict[str, str]:
    """Return the licence of each package in the table."""
    licences: dict[str, str] = {}
    for licence, packages in re.findall(r"^\| ([A-Z][\w.-]+) \| (.+) \|$", SECTION, re.MULTILINE):
        for package in re.sub(r" \([^)]*\)", "", packages).split(", "):
            name = canonicalize_name(package)
            if package != "Imago itself":
                assert name not in licences, f"{package} twice"
                licences[name] = licence
    return licences


def test_the_table_lists_exactly_the_installed_packages():
    assert table().keys() == installed("serve.lock")


def test_packages_of_other_runtimes_are_listed_below_the_table():
    for lock in sorted(DOCKER.glob("serve-*.lock")):
        for package in installed(lock.name) - installed("serve.lock"):
            named = "NVIDIA" if package.startswith("nvidia-") else package
            assert re.search(rf"\b{named}\b", SECTION), f"{lock.name}: {package}"


@pytest.mark.parametrize(("package", "licence"), sorted(table().items()))
def test_a_package_has_the_licence_in_the_table(package, licence):
    try:
        declared = metadata(package)
    except PackageNotFoundError:
        pytest.skip("not installed on this machine")
    fields = [
        declared.get("License-Expression"),
        declared.get("License"),
        *(declared.get_all("Classifier") or []),
    ]
    licence_name = licence.partition("-")[0]
    licence_fields = [text for text in fields if text and not text.startswith("Programming")]
    assert any(licence_name in text for text in licence_fields)
