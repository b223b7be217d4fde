"""The scripts in tests/reliability run from any directory and report what they promise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "reliability"
TIMEOUT_SECONDS = 500


def run_script(name: str, *arguments: str, cwd: Path) -> dict:
    """Run a script and return its report, which names no violation."""
    report = cwd / "report.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / f"{name}.py"), *arguments, "--out", str(report)],
        cwd=cwd,
        text=True,
        timeout=TIMEOUT_SECONDS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return json.loads(report.read_text())


@pytest.mark.slow  # like those below: each starts servers of its own
def test_faults_keep_their_promises(tmp_path):
    faults = ("worker-killed", "http-process-killed", "store-corrupted", "disk-full", "drained")
    flags = ("--requests", "100", "--clients", "4", "--faults", *faults)
    report = run_script("faults", *flags, cwd=tmp_path)
    assert set(report["faults"]) == set(faults)
    assert report["violations"] == []
    for outcome in report["faults"].values():
        assert outcome["times"] >= 1
        assert outcome["sent"] > 0
        assert outcome["lost"] == 0


@pytest.mark.slow
def test_a_short_soak_answers_all_requests(tmp_path):
    flags = ("--minutes", "0.2", "--clients", "2", "--hostile", "0.2", "--share", "0.5")
    report = run_script("soak", *flags, cwd=tmp_path)
    assert report["statuses"]["200"] > 0
    assert report["statuses"]["422"] > 0
    assert report["unanswered"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("script", ["fuzz_images", "fuzz_requests"])
def test_short_fuzzing_finds_nothing(tmp_path, script):
    report = run_script(script, "--minutes", "0.1", cwd=tmp_path)
    assert report["violations"] == {}
    assert report.get("images", 0) + report.get("connections", 0) > 0


@pytest.mark.slow
def test_killed_trainings_end_bit_equal(tmp_path):
    report = run_script("training_kills", "--kills", "1", "--commands", "fit", cwd=tmp_path)
    assert report["kills"] >= 1
    assert report["runs"]["fit"] >= 1


def test_coverage_guided_fuzzing_says_what_to_install(tmp_path):
    """atheris is hidden; it is not installed with Imago."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['atheris'] = None\n")
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "fuzz_parsers.py")],
        env={"PYTHONPATH": str(tmp_path)},
        text=True,
        capture_output=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 2
    assert done.stderr == "error: atheris is not installed; run pip install atheris\n"
