"""The commands of `baton`, as a user types them."""

import json
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET

from support.up import BATON, ROOT


def baton(*arguments, text=None, code=0):
    done = subprocess.run(
        [*BATON, *arguments], capture_output=True, text=True, input=text, cwd=ROOT, timeout=120
    )
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr and "Event loop is closed" not in done.stderr, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_chat_one_message_and_a_conversation(local):
    once = json.loads(
        baton("chat", "--grpc", local.grpc, "-m", "What is the capital of France?", "-o", "json")
    )
    assert (
        once["text"] == "The capital of France is Paris."
        and once["prompt_tokens"] == 34
        and once["ttft_ms"] > 0
    )
    said = baton(
        "chat",
        "--grpc",
        local.grpc,
        text="What is the capital of France?\nAnd?\n/reset\nWhat is the capital of France?\n"
        "/quit\nno\n",
    )
    assert (
        said.count("The capital of France is Paris.") == 2
        and said.count("TTFT") == 3
        and "tokens/s" in said
    )
    unreachable = baton("chat", "--grpc", "127.0.0.1:1", "-m", "x", code=2)
    assert "Connection refused" in unreachable


def test_bench_serve_reports_a_run_and_draws_it(local, tmp_path):
    plot = tmp_path / "b.svg"
    report = json.loads(
        baton(
            "bench",
            "serve",
            "--url",
            local.url,
            "--requests",
            "12",
            "--concurrency",
            "4",
            "--input-tokens",
            "40",
            "--output-tokens",
            "8",
            "--goodput",
            "e2e:60000",
            "--plot",
            str(plot),
            "-o",
            "json",
        )
    )
    assert (
        report["completed"] == 12
        and report["output_tokens"] == 96
        and report["input_tokens"] == 480
    )
    assert (
        report["attainment"] == 1.0
        and len(report["samples"]) == 12
        and report["ttft"]["count"] == 12
    )
    assert ET.parse(plot).getroot().tag.endswith("svg")
    table = baton(
        "bench",
        "serve",
        "--url",
        local.url,
        "--requests",
        "3",
        "--rate",
        "50",
        "--output-tokens",
        "4",
    )
    assert "3 of 3 requests" in table
    assert "ttft" in table and "send lag" in table
    failed = baton(
        "bench",
        "serve",
        "--url",
        local.url,
        "--requests",
        "2",
        "--concurrency",
        "1",
        "--input-tokens",
        "9000",
        code=1,
    )
    assert failed.strip() == ""
    assert "how to offer load" in baton("bench", "serve", "--url", local.url, code=2)
    assert "no OpenAI-style server" in baton(
        "bench", "serve", "--url", "http://127.0.0.1:1", "--concurrency", "1", code=2
    )


def test_collect_env_tells_nothing_private():
    facts = json.loads(baton("collect-env", "-o", "json"))
    assert facts["packages"]["torch"].startswith("2.") and facts["cores"] >= 1
    assert str(ROOT) not in json.dumps(facts)
    assert "packages:" in baton("collect-env")


def test_down_ends_what_up_started_and_nothing_else(start, local):
    up = start("--local")
    port = up.url.rpartition(":")[2]
    assert "choose one with --http-port" in baton("down", code=2)
    assert f"HTTP port {port}" in baton("down", "--http-port", port)
    assert up.process.wait(timeout=5) == 0
    assert f"no `baton up` with HTTP port {port}" in baton("down", "--http-port", port, code=2)
    assert local.complete().status_code == 200


def test_a_request_can_be_explained_and_an_unknown_one_is_named(local):
    reply_id = local.complete().json()["id"]
    asked = ("explain", "request", reply_id, "--url", local.url)
    found = json.loads(baton(*asked, "-o", "json"))
    assert reply_id == f"cmpl-{found['request_id']}" and found["outcome"] == "ok"
    assert found["decision"]["decode_worker"].startswith("decode")
    assert [a["outcome"] for a in found["attempts"]] == ["ok"] and not found["attempts"][0][
        "is_move"
    ]
    measured = found["measured"]
    assert measured["prefill_ms"] > 0 and found["charge"] is None
    parts = sum(measured[f"{part}_ms"] for part in ("queue", "prefill", "transfer"))
    assert abs(parts - measured["total_ms"]) < 0.01
    assert abs(measured["total_ms"] - measured["predicted_ms"] - measured["error_ms"]) < 0.01
    text = baton(*asked)
    for shown in (
        found["decision"]["decode_worker"],
        f"measured {measured['total_ms']:.1f} ms",
        "attempt 0: pd",
        f"at {found['router']}",
    ):
        assert shown in text
    unknown = baton("explain", "request", "nobody/..%2f?", "--url", local.url, code=2)
    assert "remembers no request 'nobody/..%2f?'" in unknown
    assert "the newest 2048" in unknown


def test_the_prefix_index_can_be_seen(local):
    for _ in range(10):  # on a busy machine the store may be late
        report = json.loads(baton("prefix", "stats", "--url", local.url, "-o", "json"))
        if report["state"] == "ok":
            break
    assert report["state"] == "ok" and not report["refused"]
    assert "blocks of" in baton("prefix", "stats", "--url", local.url)
    rows = json.loads(baton("prefix", "top", "--url", local.url, "-o", "json"))
    assert all(row["blocks"] >= 0 for row in rows)


def test_top_shows_a_cluster_at_work(local):
    # As in the foreground: a shell's background jobs ignore Ctrl-C, and so would what they start.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "from cli.main import main; main()"
    watching = subprocess.Popen(
        [sys.executable, "-c", program, "top", "--url", local.url, "--interval", "0.5"]
        + ["-o", "json"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        before = json.loads(watching.stdout.readline())
        assert before["models"] == ["baton-tiny"] and before["requests_per_s"] is None
        assert local.complete(max_tokens=16, ignore_eos=True).status_code == 200
        for line in watching.stdout:
            found = json.loads(line)
            if found["requests_per_s"]:
                break
        watching.send_signal(signal.SIGINT)
        assert watching.wait(timeout=30) == 0
    finally:
        watching.kill()
        watching.stdout.close()
    assert round(found["output_tokens_per_s"] * found["window_s"]) >= 16
    assert found["tiers"]["standard"]["attainment"] == 1.0
    assert {w["role"] for w in found["workers"]} == {"prefill", "decode"}
    assert all(w["total_blocks"] and w["state"] == "live" for w in found["workers"])
    assert all(link["transport"] for link in found["links"]) and found["links"]
    once = json.loads(baton("top", "--url", local.url, "--once", "-n", "0.2", "-o", "json"))
    assert once.keys() == found.keys()
    assert "standard" in baton("top", "--url", local.url, "--once", "-n", "0.2")
    assert "no router answers" in baton("top", "--url", "http://127.0.0.1:1", code=2)


def test_help_is_quick_to_read_and_lists_every_command():
    text = baton("--help")
    for command in (
        "up",
        "down",
        "status",
        "generate",
        "chat",
        "bench",
        "check-config",
        "collect-env",
        "explain",
        "prefix",
        "simulate",
        "top",
        "version",
    ):
        assert command in text


def test_the_version_is_a_command_and_an_option():
    assert baton("--version") == baton("version")
    assert json.loads(baton("version", "-o", "json")).keys() == {"version"}
