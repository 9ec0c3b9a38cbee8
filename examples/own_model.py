"""Serve a model of your own: `python examples/own_model.py FOLDER [HTTP_PORT]`.

FOLDER is a Hugging Face folder: config.json, tokenizer.json and safetensors. To make a tiny one:

    python tools/train_tiny_model.py --steps 400 --out /tmp/models    # minutes, on one core
    python examples/own_model.py /tmp/models/baton-tiny

By hand: `baton up --local --colocated --model FOLDER`, a request, and `baton down`.
"""

import subprocess
import sys
import time

import httpx

START_TIMEOUT_S = 120.0
BATON = [sys.executable, "-m", "cli.main"]


def wait_ready(url: str, cluster: subprocess.Popen[bytes]) -> None:
    """Return once a request gets through the whole cluster."""
    give_up_at = time.monotonic() + START_TIMEOUT_S
    while cluster.poll() is None and time.monotonic() < give_up_at:
        try:
            if httpx.get(f"{url}/ready", timeout=5).is_success:
                return
        except httpx.HTTPError:
            pass  # it is not listening yet
        time.sleep(0.2)
    raise SystemExit("the cluster did not start; its last log lines give the reason")


def main() -> None:
    """Start a cluster with the model, continue one text, end the cluster."""
    folder = sys.argv[1]
    port = sys.argv[2] if len(sys.argv) > 2 else "8000"
    url = f"http://127.0.0.1:{port}"
    up = [*BATON, "up", "--local", "--colocated", "--model", folder]
    cluster = subprocess.Popen([*up, "--http-port", port, "--grpc-port", "0"])
    try:
        wait_ready(url, cluster)
        body = {"prompt": "def main(", "max_tokens": 24, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        print(f"{answer['model']} continues:", repr(answer["choices"][0]["text"]), flush=True)
    finally:
        cluster.terminate()
        cluster.wait(timeout=60)


if __name__ == "__main__":
    main()
