"""Start and stop: settings, API key, ports, stores and bundles that are refused."""

import json
import os
import re
import shutil
import socket
import sys
from pathlib import Path

import pytest

from models.cpu_quota import available_cores
from serve.settings import Settings
from support import tiny_bundle
from support.server import assert_refused, loopback_flags, spawn_serve, wait_until


def test_help_lists_every_setting_with_its_variable(run_serve):
    text = run_serve("--help").stdout
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')} " in text
        assert f"[IMAGO_{name.upper()}" in text.replace("\n", "").replace(" " * 24, "")


def test_an_empty_store_is_refused(run_serve, tmp_path):
    assert_refused(run_serve("--store", str(tmp_path)), "no model in this store")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--threads", "-1"], "--threads (IMAGO_THREADS): Input should be greater than"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        ([], "no model in this store"),
    ],
)
@pytest.mark.parametrize("by_flag", [True, False], ids=["--log-format", "IMAGO_LOG_FORMAT"])
def test_errors_at_the_start_are_json_where_the_log_is(run_serve, by_flag, flags, words, tmp_path):
    flags = ["--store", str(tmp_path), *flags]
    if by_flag:
        result = run_serve(*flags, "--log-format", "json", IMAGO_LOG_FORMAT="text")
    else:
        result = run_serve(*flags, IMAGO_LOG_FORMAT="json")
    assert_refused(result)
    record = json.loads(result.stderr)
    assert words in record["message"]
    assert (record["level"], record["logger"]) == ("error", "imago")
    assert record.keys() == {"time", "level", "logger", "message"}


def test_one_of_several_models_must_be_named(run_serve, tmp_path):
    tiny_bundle.publish(tmp_path, "one")
    tiny_bundle.publish(tmp_path, "two")
    assert_refused(run_serve("--store", str(tmp_path)), "--model", "one, two")
    assert_refused(run_serve("--store", str(tmp_path), "--model", "three"), "three", "one, two")
    assert_refused(
        run_serve(IMAGO_STORE=str(tmp_path), IMAGO_MODEL="one", IMAGO_VERSION="9"), "no version 9"
    )


def test_a_changed_bundle_is_refused(run_serve, tmp_path):
    directory = tiny_bundle.publish(tmp_path)
    with (directory / "model.onnx").open("ab") as file:
        file.write(b"\0")
    assert_refused(run_serve("--store", str(tmp_path), *loopback_flags()), "model.onnx", "changed")


def test_a_bundle_with_other_outputs_is_refused(run_serve, tmp_path):
    directory = tiny_bundle.publish(tmp_path)
    other = tiny_bundle.publish(tmp_path, scale=2)
    (directory / "samples" / "expected.npz").write_bytes(
        (other / "samples" / "expected.npz").read_bytes()
    )
    tiny_bundle.update_checksums(directory)
    assert_refused(
        run_serve("--store", str(tmp_path), "--version", "1", *loopback_flags()),
        "self check",
        "differ",
    )


def test_a_bundle_with_other_samples_is_refused(run_serve, tmp_path):
    directory = tiny_bundle.publish(tmp_path)
    (directory / "samples" / "00.png").write_bytes(tiny_bundle.make_image("green"))
    tiny_bundle.update_checksums(directory)
    assert_refused(
        run_serve("--store", str(tmp_path), *loopback_flags()),
        "samples decode differently on this machine",
    )


def test_a_bundle_whose_graph_fails_is_refused(run_serve, tmp_path):
    tiny_bundle.fail_on_bright_pixels(tiny_bundle.publish(tmp_path), 0.1)
    assert_refused(
        run_serve("--store", str(tmp_path), *loopback_flags()),
        "colours/1",
        "onnxruntime can't run it",
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--port", "70000"), ("--port", "IMAGO_PORT")),
        (("--port", "x"), ("--port",)),
        (("--version", "first"), ("--version",)),
        (("--cors-origins", "app.example.com"), ("--cors-origins", "app.example.com")),
        (("--cors-origins", "https://a.example,https://b.example/x"), ("https://b.example/x",)),
        (("--api-key", "x", "--api-key-file", "/etc/hostname"), ("api_key",)),
        (("--api-key-file", "/nowhere"), ("/nowhere",)),
        # Even root can't read this file.
        (("--api-key-file", "/proc/self/mem"), ("/proc/self/mem", "can't be read")),
        (("--api-key-file", sys.executable), (sys.executable, "can't be read")),
    ],
)
def test_invalid_settings_are_refused(run_serve, bundle_store, flags, words):
    assert_refused(run_serve("--store", str(bundle_store), *flags), *words)


@pytest.mark.parametrize("name", ["IMAGO_PORT", "IMAGO_METRICS_PORT"])
def test_a_port_from_a_service_of_kubernetes_is_explained(run_serve, bundle_store, name):
    result = run_serve("--store", str(bundle_store), **{name: "tcp://10.0.0.1:80"})
    assert_refused(result, name, "tcp://10.0.0.1:80", "Service", "enableServiceLinks")


@pytest.mark.parametrize(
    ("flags", "env", "words"),
    [
        (("--api-key", ""), {}, ("--api-key", "IMAGO_API_KEY", "empty")),
        (("--api-key", " \n"), {}, ("--api-key", "empty")),
        (("--api-key-file", ""), {}, ("--api-key-file",)),
        ((), {"IMAGO_API_KEY": ""}, ("IMAGO_API_KEY is empty",)),
        ((), {"IMAGO_API_KEY": "\n"}, ("IMAGO_API_KEY", "empty")),
        ((), {"IMAGO_API_KEY_FILE": ""}, ("IMAGO_API_KEY_FILE is empty",)),
    ],
)
def test_an_empty_key_is_refused(run_serve, bundle_store, flags, env, words):
    assert_refused(
        run_serve("--store", str(bundle_store), *loopback_flags(), *flags, **env), *words
    )


@pytest.mark.parametrize(
    ("flags", "env"),
    [
        ((), {"IMAGO_API_KEY": "secret\n"}),
        (("--api-key", " secret "), {"IMAGO_API_KEY": ""}),
    ],
)
def test_white_space_around_the_key_is_ignored(start, flags, env):
    server = start(*flags, env=env)
    image = tiny_bundle.make_image("red")
    assert server.predict(image).status_code == 401
    assert server.predict(image, **{"X-API-Key": "secret"}).status_code == 200


def test_threads_are_per_worker(run_serve, bundle_store):
    help_text = " ".join(run_serve("--help").stdout.split())
    assert "cores of each worker; 0: the CPU quota divided by the workers" in help_text

    flags = ("--threads", "3", "--workers", "2")
    output = run_serve("check", "--store", str(bundle_store), *flags).stdout
    assert "3 for each of 2 workers" in output


@pytest.mark.skipif(shutil.which("taskset") is None, reason="this machine has no taskset")
def test_threads_follow_the_cpu_affinity(start, tmp_path):
    """Each predictor thread has its own file of counters, so their number shows the threads."""
    all_cores = sorted(os.sched_getaffinity(0))
    for cores in (all_cores[:1], all_cores):
        server = start(
            command=["taskset", "-c", ",".join(map(str, cores)), sys.executable, "-m", "serve"]
        )
        maps = Path(f"/proc/{server.workers()[0]}/maps").read_text()
        threads = set(re.findall(r"/worker-0-(\d+)\.metrics", maps))
        assert len(threads) == min(len(cores), available_cores())


def test_a_port_in_use_is_refused(run_serve, bundle_store):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_refused(
            run_serve("--store", str(bundle_store), "--host", "127.0.0.1", "--port", str(port)),
            str(port),
            "in use",
        )


def test_an_ipv6_host_is_refused_without_ipv6(bundle_store, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import socket; socket.AF_INET6 = 999")
    assert_refused(
        spawn_serve("--store", str(bundle_store), "--host", "::", PYTHONPATH=str(tmp_path)),
        "--host",
        "::",
    )


def test_tracing_is_refused_without_its_packages(bundle_store, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.modules['opentelemetry.exporter'] = None"
    )
    assert_refused(
        spawn_serve(
            "--store",
            str(bundle_store),
            "--tracing",
            "true",
            *loopback_flags(),
            PYTHONPATH=str(tmp_path),
        ),
        "imago[tracing]",
    )


def test_the_log_names_the_model_and_its_url(start):
    server = start()
    message = f"serving colours on http://127.0.0.1:{server.port}"
    wait_until(lambda: message in server.log.read_text())


def test_sigterm_stops_the_service(start):
    server = start()
    assert server.predict(tiny_bundle.make_image("red")).status_code == 200
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()
