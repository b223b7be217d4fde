"""The scripts behind the published numbers run as they say."""
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPTS / f"{script}.py"), *argv], cwd=cwd, text=True, timeout=280,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow  # each imports all that trains
@pytest.mark.parametrize("script", ["audit_speed", "data_augment", "train_recipes", "train_speed"])
def test_a_script_needs_no_path_set_for_it(script, tmp_path):
    done = run(script, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("usage: ")


def test_a_twin_that_would_not_follow_the_recipe_is_refused(tmp_path):
    done = run("train_recipes", "digits", "--twin", "--logger", "none", "--audit.enabled", "false", cwd=tmp_path)
    assert done.returncode == 1
    assert "--twin: the bare loop has no ema.decay;" in done.stdout.splitlines()[-1]
