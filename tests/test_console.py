"""The console script `imago` passes its arguments to train, serve and models."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from models.console import main
from support import ROOT


def run_imago(*arguments: str) -> subprocess.CompletedProcess:
    """Run what the console script runs."""
    command = [sys.executable, "-m", "models.console", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_pyproject_installs_the_script():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"imago": "models.console:main"}


def test_models_lists_a_store(bundle_store: Path):
    result = run_imago("models", "list", "--store", str(bundle_store))
    assert result.returncode == 0, result.stderr
    assert "colours" in result.stdout


@pytest.mark.parametrize(
    ("command", "setting"), [("serve", "--max-batch-size"), ("train", "run DATA")]
)
def test_a_command_shows_its_own_help(command, setting, capsys):
    """In this process, which has imported most of what a new interpreter would import."""
    with pytest.raises(SystemExit) as end:
        sys.exit(main([command, "--help"]))
    assert not end.value.code
    text = capsys.readouterr().out
    assert "usage:" in text
    assert setting in text


def test_the_exit_status_of_a_command_is_passed_on(tmp_path):
    result = run_imago("models", "show", "digits", "--store", str(tmp_path))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1


def test_without_a_command_it_lists_them():
    result = run_imago()
    assert result.returncode == 0
    for command in ("train", "serve", "models"):
        assert f"  {command}" in result.stdout


def test_an_unknown_command_is_refused_in_one_line():
    result = run_imago("predict")
    assert result.returncode == 2
    assert result.stderr == "error: imago has no command 'predict'; it has train, serve, models\n"
