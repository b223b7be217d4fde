"""k8s/cluster as `make` runs it, with a kubectl that stands in for a cluster's."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support.manifests import K8S

needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
RunCluster = Callable[..., tuple[subprocess.CompletedProcess, str]]


def run_cluster_script(verb: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [K8S / "cluster", verb], capture_output=True, text=True, env={**os.environ, **env}
    )


def error_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("make: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def make_fake_cluster(place: Path) -> RunCluster:
    """Runs a verb where a cluster does this when it is asked something with these words; also all that it was asked.

    Anything else it leaves without an answer: what is not named is not there.
    """

    def run_there(
        verb: str, answers: dict[str, str], **env: str
    ) -> tuple[subprocess.CompletedProcess, str]:
        kubectl = place / "kubectl"
        cases = "".join(f"*'{words}'*) {does} ;;\n" for words, does in answers.items())
        kubectl.write_text(f"""#!/bin/sh
          echo "$*" >>"$0.calls"
          case "$*" in
            kustomize*) exec {shutil.which("kubectl")} "$@" ;;
            {cases}
          esac""")
        kubectl.chmod(0o755)
        done = run_cluster_script(verb, **env, PATH=f"{place}:{os.environ['PATH']}")
        return done, (place / "kubectl.calls").read_text()

    return run_there


def admission_errors(*reasons: str) -> dict[str, str]:
    return {
        "--dry-run": f"printf '%s\\n' {shlex.join(reasons)} >&2; exit 1",
        "apply -f -": "exit 1",
    }
