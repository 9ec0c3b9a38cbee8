"""Every example runs as its first lines say."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COVERED = {"quickstart_openai", "quickstart_grpc", "own_model", "own_transport", "benchmark"}


def run(name, *arguments):
    command = [sys.executable, f"examples/{name}.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=150, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_example_is_forgotten():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == COVERED


def test_the_quickstart_with_openais_client(local):
    assert run("quickstart_openai", local.url) == "The capital of France is Paris.\n"


def test_the_quickstart_over_grpc(local):
    assert run("quickstart_grpc", "127.0.0.1:1", local.grpc).startswith(
        "The capital of France is Paris.\n32 tokens, TTFT"
    )


def test_the_benchmark_from_python(local):
    lines = run("benchmark", local.url).splitlines()
    assert "16 of 16 completed" in lines


def test_a_transport_of_ones_own():
    assert run("own_transport").startswith("256 MiB in ")


def test_a_model_of_ones_own():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    said = run("own_model", "models/baton-tiny-draft", str(port))
    assert "\nbaton-tiny-draft continues: '" in f"\n{said}"
