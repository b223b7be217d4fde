"""Rules of the repository: layout, imports, style, language, links, lock files and make."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import code_style
from support import ROOT

BIN = Path(sys.executable).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

TOP_LEVEL = {
    *("train", "serve", "models", "docker", "k8s", "tests"),
    *("CHANGELOG.md", "LICENSE", "Makefile", "README.md", "pyproject.toml"),
}

# Turns that no technical documentation uses. This file is the only one that may contain them.
BANNED_PHRASES = [
    "\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}",
    "\N{RIGHT-POINTING DOUBLE ANGLE QUOTATION MARK}",
    "away with it",
    "becomes of",
    "it is so.",
    "lost their fine colours",
    "spoke for",
    "take it away",
    "there is no such thing",
    "this is no proxy",
    "what was seen",
]
GENERATED = (".lock", ".json", "LICENSE", ".png", ".svg")


# `[text](target)`, `![text](target)` and the definition `[name]: target`, without the #anchor.
MARKDOWN_TARGET = re.compile(r"\]\(([^)\s#]+)|^\[[^\]\s]+\]: ([^\s#]+)", re.MULTILINE)

COMPARED = ROOT / "tests/benchmarks/COMPARED.md"
NO_SOURCE = "no source found"


def list_tracked_files() -> list[str]:
    result = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [name for name in result.stdout.splitlines() if (ROOT / name).is_file()]


def run_tool(*command: str) -> None:
    """Run one of the virtual environment's tools and assert that it has no complaint."""
    name, *arguments = command
    result = subprocess.run([BIN / name, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def read_pins(lock: str) -> dict[str, str]:
    """Package to version, from a lock file."""
    text = (ROOT / "docker" / lock).read_text()
    return dict(re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, re.MULTILINE))


def test_the_top_level_is_the_agreed_one():
    names = {name.split("/")[0] for name in list_tracked_files()}
    visible = {name for name in names if not name.startswith(".")}
    assert visible <= TOP_LEVEL
    assert TOP_LEVEL - visible <= {"CHANGELOG.md"}


def test_imports_follow_the_layers():
    run_tool("lint-imports")


def test_no_modules_import_one_another():
    """Nor behind TYPE_CHECKING, where import-linter may be told to ignore it."""
    modules = code_style.load_modules(ROOT)
    assert code_style.find_import_cycles(modules) == []


def test_the_code_passes_ruff():
    run_tool("ruff", "check", ".")


def test_the_code_is_formatted():
    run_tool("ruff", "format", "--check", ".")


def test_no_text_holds_a_banned_phrase():
    offences: list[str] = []
    for name in list_tracked_files():
        path = ROOT / name
        if name.endswith(GENERATED) or path == Path(__file__):
            continue
        text = " ".join(path.read_text().lower().split())
        offences += [f"{name}: {phrase}" for phrase in BANNED_PHRASES if phrase in text]
    assert offences == []


def test_relative_links_in_markdown_lead_to_files():
    broken: list[str] = []
    for name in list_tracked_files():
        if not name.endswith(".md"):
            continue
        file = ROOT / name
        for inline, defined in MARKDOWN_TARGET.findall(file.read_text()):
            target = inline or defined
            is_checked = not re.match(r"[a-z]+:", target)
            if is_checked and not (file.parent / target).exists():
                broken.append(f"{name}: {target}")
    assert broken == []


def test_each_cell_of_the_comparison_has_its_source():
    text = COMPARED.read_text()
    sources = dict(re.findall(r"^\[(\S+)\]: (\S+)$", text, re.MULTILINE))
    cited: set[str] = set()
    tables = re.findall(r"^\| feature \|.*\n(?:\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 2

    for table in tables:
        header, _, *rows = table.splitlines()
        for row in rows:
            feature, *cells = [cell.strip() for cell in row.strip("|").split("|")]
            assert len(cells) == header.count("|") - 2, feature
            for cell in cells:
                if cell == NO_SOURCE:
                    continue
                link = re.fullmatch(r"\[.+\]\[(\S+)\]", cell)
                assert link, f"{feature}: {cell} has no source"
                cited.add(link[1])

    assert cited == sources.keys()
    own_sources = [target for target in sources.values() if target.startswith("../../")]
    assert own_sources
    assert all(re.match(r"https://|\.\./\.\./", target) for target in sources.values())


def test_the_readme_of_the_benchmarks_names_each_script_and_make_runs_them():
    folder = ROOT / "tests/benchmarks"
    text = (folder / "README.md").read_text()
    scripts = [file.name for file in folder.glob("*.py") if "ArgumentParser" in file.read_text()]
    assert len(scripts) >= 12
    unnamed = [name for name in scripts if name not in text]
    assert unnamed == []

    for target, flag in (("bench", "bench.py"), ("bench-full", "bench.py --full")):
        printed = subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert f"tests/benchmarks/{flag}" in printed


def test_locks_satisfy_the_declared_ranges_and_name_no_index():
    extras = PROJECT["optional-dependencies"]
    wanted = {
        "serve.lock": extras["serve"],
        "serve-cuda.lock": [
            re.sub("^onnxruntime(?=[>=])", "onnxruntime-gpu", r) for r in extras["serve"]
        ],
        "serve-openvino.lock": extras["serve"] + extras["openvino"],
        "train.lock": extras["train"] + extras["serve"],
        "dev.lock": extras["train"] + extras["serve"] + extras["dev"],
    }
    for lock, requirements in wanted.items():
        locked = read_pins(lock)
        for requirement in map(Requirement, PROJECT["dependencies"] + requirements):
            assert requirement.specifier.contains(locked[requirement.name]), (
                f"{requirement} in {lock}"
            )
        assert "://" not in re.sub(r"#.*", "", (ROOT / "docker" / lock).read_text()), (
            f"an address in {lock}"
        )


def test_only_pyproject_states_versions_of_what_is_locked():
    printed = subprocess.run(
        ["make", "-n", "lock"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "docker/serve-openvino.lock" in printed
    assert not re.findall(r"[\w\]][<>=~]=\d", printed)


@pytest.mark.parametrize("lock", sorted(p.name for p in (ROOT / "docker").glob("serve*.lock")))
def test_serving_locks_have_hashes_and_no_torch(lock):
    locked = read_pins(lock)
    assert not {"torch", "torchvision", "lightning"} & set(locked)
    text = (ROOT / "docker" / lock).read_text()
    _, *entries = re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)
    assert len(entries) >= len(locked)  # a package may have an entry for each Python version
    assert all("--hash=sha256:" in entry for entry in entries)
    assert ("onnxruntime" in locked) is ("onnxruntime-gpu" not in locked), (
        "each package overwrites files of the other"
    )


def test_the_tested_images_are_the_built_ones():
    for runtime, suffix in (("cpu", ""), ("openvino", "-openvino")):
        printed = subprocess.run(
            ["make", "-n", "test-images", f"RUNTIME={runtime}", "REGISTRY=here", "TAG=7"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert f"IMAGO_TEST_IMAGES='here/imago-serve:7{suffix} here/imago-train:7'" in printed


def test_make_alone_lists_every_target():
    result = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("train", "serve", "test", "audit", "lock"):
        assert re.search(rf"^  make {target} +\w", result.stdout, re.MULTILINE)
    for variable in ("DATA", "NAME", "RECIPE", "STORE", "PORT", "ARGS"):
        assert variable in result.stdout
