"""k8s/cluster as `make` runs it, with a kubectl on PATH that answers as a cluster would."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support.manifests import K8S, KUSTOMIZE, kustomize_variables

needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")

RunCluster = Callable[..., tuple[subprocess.CompletedProcess[str], str]]

KUBECTL = """#!/bin/sh
echo "$*" >>"$0.calls"
case "$*" in
  kustomize*) {kustomize} ;;
  {answers}
esac
"""


def run_cluster_script(verb: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `k8s/cluster VERB` with these variables in its environment."""
    return subprocess.run(
        [K8S / "cluster", verb], capture_output=True, text=True, env={**os.environ, **env}
    )


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that the script prints when it exits with 2."""
    assert result.returncode == 2, result.stdout + result.stderr
    return error_message(result)


def error_message(result: subprocess.CompletedProcess[str]) -> str:
    """The only line on stderr."""
    assert result.stderr.startswith("make: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def make_fake_cluster(directory: Path) -> RunCluster:
    """Return a function that runs a verb against a fake kubectl in `directory`.

    It takes the verb and the cluster's answers: for a command line that contains the key, the fake
    runs the value as shell; every other call prints nothing. It returns the result and the command
    lines of all calls.
    """

    def run(
        verb: str, answers: dict[str, str], **env: str
    ) -> tuple[subprocess.CompletedProcess[str], str]:
        cases = [f"*'{words}'*) {command} ;;" for words, command in answers.items()]
        kubectl = directory / "kubectl"
        kubectl.write_text(
            KUBECTL.format(
                kustomize=KUSTOMIZE.format(**kustomize_variables()), answers="\n  ".join(cases)
            )
        )
        kubectl.chmod(0o755)

        path = f"{directory}:{os.environ['PATH']}"
        result = run_cluster_script(verb, **env, PATH=path)
        return result, (directory / "kubectl.calls").read_text()

    return run


def admission_errors(*reasons: str) -> dict[str, str]:
    """Answers of a cluster that rejects the manifests with these lines."""
    return {
        "--dry-run": f"printf '%s\\n' {shlex.join(reasons)} >&2; exit 1",
        "apply -f -": "exit 1",
    }
