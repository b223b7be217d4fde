"""The Dockerfiles as text, and the errors of the scripts in docker/."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def test_hadolint_reports_nothing():
    result = subprocess.run(
        [Path(sys.executable).parent / "hadolint", *FILES], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_images_have_a_numeric_user_and_the_given_base(file):
    text = file.read_text()
    for base in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
        assert base in ("${BASE}", "scratch"), base
    if "ENTRYPOINT" in text:
        assert re.findall(r"^USER (.*)", text, re.MULTILINE) == ["65532:65532"]
        assert "STOPSIGNAL SIGTERM" in text
    assert not re.search(r":latest|^ADD |password|token", text, re.MULTILINE | re.IGNORECASE)


@pytest.mark.parametrize("kind", ["serve", "train"])
def test_images_are_labelled_with_version_revision_and_base(kind):
    last_stage = (ROOT / f"docker/{kind}.Dockerfile").read_text().split("\nFROM ")[-1]
    labels = dict(re.findall(r'org\.opencontainers\.image\.([\w.]+)="(.*?)"', last_stage))
    assert labels.pop("description")
    assert labels == {
        "title": f"Imago {kind}",
        "licenses": "Apache-2.0",
        "version": "${VERSION}",
        "revision": "${REVISION}",
        "source": "${SOURCE}",
        "base.name": "${BASE}",
    }

    before_labels = last_stage.partition("LABEL ")[0]
    declarations = " ".join(re.findall(r"^ARG (.*)", before_labels, re.MULTILINE))
    declared = set(re.findall(r"\w+", declarations))
    assert {"VERSION", "REVISION", "SOURCE", "BASE"} <= declared, (
        "an argument is known only in its stage"
    )


def test_serving_packages_are_installed_by_hash():
    text = (ROOT / "docker/serve.Dockerfile").read_text()
    assert "--require-hashes" in text
    assert "--no-deps" in text


@pytest.mark.parametrize(
    ("status", "is_healthy"),
    [(200, True), (503, False), (None, False)],
    ids=["ready", "not ready", "no server"],
)
def test_the_health_check_queries_readiness(status, is_healthy):
    text = (ROOT / "docker/serve.Dockerfile").read_text()
    (command,) = re.findall(r"^HEALTHCHECK .*\\\n +CMD (\[.*\])$", text, re.MULTILINE)
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        port = server.server_port
        if status:
            threading.Thread(target=server.handle_request).start()
        else:
            server.server_close()
        result = subprocess.run(
            [sys.executable, *json.loads(command)[1:]],
            capture_output=True,
            timeout=20,
            env=os.environ | {"IMAGO_PORT": str(port)},
        )
    assert (result.returncode == 0) is is_healthy, result.stderr
    assert requests == (["/health/ready"] if status else [])


def test_dockerignore_allows_only_what_is_copied():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert "*" in lines
    for file in FILES:
        if file.name == "model.Dockerfile":  # its build context is a store
            continue
        for source in re.findall(r"^COPY (?!--from)(\S+) ", file.read_text(), re.MULTILINE):
            top = source.split("/")[0]
            assert top in allowed or any(Path(source).match(pattern) for pattern in allowed), source


@pytest.mark.parametrize("kind", ["serve", "train"])
def test_file_modes_do_not_depend_on_the_umask(kind):
    """A strict umask would hide the files from the user of the image."""
    *before, last = (ROOT / f"docker/{kind}.Dockerfile").read_text().split("\nFROM ")
    assert re.findall(r"^COPY (?!--from)", last, re.MULTILINE) == []
    (sources,) = (stage for stage in before if " AS sources\n" in stage)
    assert "\nRUN chmod -R u=rwX,go=rX /app\n" in sources


def run(script: str | Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / script, *words], capture_output=True, text=True, env={**os.environ, **env}
    )


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that a script prints when it exits with 2."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_no_engine_is_one_line():
    assert "install podman" in error_line(run("docker/engine", "images", ENGINE="no-such-engine"))


def test_an_unknown_runtime_is_one_line():
    assert "unknown RUNTIME 'abacus'; choose one of: cpu" in error_line(
        run("docker/build", "serve", RUNTIME="abacus")
    )


@pytest.fixture
def build(tmp_path):
    """Return the arguments of a build by an engine, with a replaced `python3`."""

    def build(engine: str, python: str) -> list[str]:
        fake_engine = f'[ "$1" = --version ] && echo {engine} version 5 || echo "$*"'
        for name, commands in {engine: fake_engine, "python3": python}.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{commands}\n")
            (tmp_path / name).chmod(0o755)
        path = f"{tmp_path}:{os.environ['PATH']}"
        result = run("docker/engine", "build", ".", ENGINE=engine, BUILD_FLAGS="", PATH=path)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout.split()

    return build


PIP = """cat <<END
global.index-url='https://pip.example.com/simple'
global.find-links='/tmp'
:env:.cert='$0'
END"""


def test_docker_gets_the_settings_of_pip_as_secrets(build):
    words = build("docker", PIP)
    secrets = [words[i + 1] for i, word in enumerate(words) if word == "--secret"]
    assert [secret.partition(",src=")[0] for secret in secrets] == ["id=pip", "id=ca"]
    assert {word for word in words if word.startswith("-")} == {"--secret"}


def test_podman_also_gets_the_wheels_on_this_machine(build):
    words = build("podman", PIP)
    assert words.count("--secret") == 2
    assert {"--format", "--network", "--volume", "/tmp:/tmp:ro"} <= set(words)


@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_a_python_without_pip_passes_no_settings(engine, build):
    words = build(engine, "exit 1")
    assert (words[0], words[-1]) == ("build", ".")


def test_podman_is_used_where_docker_can_not_build(tmp_path):
    """From version 23 on docker needs a plugin for BuildKit."""
    docker = {
        "info": "true",
        "buildx": "exit 1",
        "version": "echo 28.2.2",
        "--version": "echo Docker version 28.2.2",
    }
    podman = {"info": "true", "--version": "echo podman version 5.4.0", "images": "echo by podman"}
    for name, actions in {"docker": docker, "podman": podman}.items():
        cases = "\n".join(f"{verb}) {action};;" for verb, action in actions.items())
        (tmp_path / name).write_text(f'#!/bin/sh\ncase "$1" in {cases} *) exit 1;; esac\n')
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = run("docker/engine", "images", PATH=path, ENGINE="")
    assert result.stdout == "by podman\n", result.stderr
    assert "docker-buildx" in error_line(run("docker/engine", "images", PATH=path, ENGINE="docker"))
    (tmp_path / "docker").write_text(
        '#!/bin/sh\n[ "$1" != buildx ] && echo 20.10.24 $DOCKER_BUILDKIT\n'
    )
    assert run("docker/engine", "images", PATH=path, ENGINE="").stdout == "20.10.24 1\n"


@pytest.mark.slow
def test_the_revision_of_changed_sources_is_dirty(tmp_path):
    """Only sources that the image contains count."""
    calls = tmp_path / "calls"
    tools = tmp_path / "tools"
    root = tmp_path / "root"
    for script in ("build", "engine"):
        (root / "docker").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "docker" / script, root / "docker")
    tools.mkdir()
    (tools / "podman").write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo podman version 5 || echo "$*" >>{calls}\n'
    )
    (tools / "podman").chmod(0o755)

    def passed(argument: str) -> str:
        """Build, and return the build argument that the engine got."""
        calls.unlink(missing_ok=True)
        path = f"{tools}:{os.environ['PATH']}"
        result = run(root / "docker/build", "train", ENGINE="podman", PATH=path)
        assert result.returncode == 0, result.stdout + result.stderr
        return re.findall(rf"{argument}=(\S+)", calls.read_text())[0]

    def git(*words: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=root, check=True
        )

    git("init", "--quiet")
    assert passed("REVISION") == passed("SOURCE") == "unknown"
    git("add", ".")
    git("commit", "--quiet", "--message=a")
    (root / "notes").write_text("not of the images")
    assert re.fullmatch(r"[0-9a-f]{40}", passed("REVISION"))
    for remote in (
        "https://me:secret@example.com/me/imago.git",
        "https://example.com/me/imago.git",
    ):
        git("config", "remote.origin.url", remote)
        assert passed("SOURCE") == "https://example.com/me/imago.git"
    (root / "train").mkdir()
    (root / "train/new.py").touch()
    assert re.fullmatch(r"[0-9a-f]{40}-dirty", passed("REVISION"))


def test_a_missing_base_image_is_one_line(engine):
    error = error_line(run("docker/build", "serve", BASE="localhost:1/no/such:image"))
    assert "the base image localhost:1/no/such:image is not on this machine" in error


def test_the_steps_of_a_build_are_printed_and_its_log_after_a_failure(tmp_path):
    """The rest of the output is only of interest where the build fails."""
    lines = (
        "STEP 1/3: FROM base AS packages\\nCollecting numpy\\n[2/2] STEP 2/3: RUN pip install\\n"
    )
    (tmp_path / "podman").write_text(f"""#!/bin/sh
case "$*" in
  --version) echo podman version 5 ;;
  *build*) printf '{lines}'; exit $BUILD_STATUS ;;
esac
""")
    (tmp_path / "podman").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = run("docker/build", "train", ENGINE="podman", PATH=path, BUILD_STATUS="0")
    assert result.returncode == 0, result.stderr
    steps = "  STEP 1/3: FROM base AS packages\n  STEP 2/3: RUN pip install\n"
    assert result.stdout == f"Building localhost/imago-train:dev\n{steps}"

    failed = run("docker/build", "train", ENGINE="podman", PATH=path, BUILD_STATUS="1")
    assert failed.returncode == 2
    assert "Collecting numpy" in failed.stderr
    assert "the build of localhost/imago-train:dev failed" in failed.stderr.splitlines()[-1]
