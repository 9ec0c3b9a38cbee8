"""What a cluster's servers say of it, and that nothing is held at the end."""

import asyncio
import json
import subprocess
import sys

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.up import idle

FRANCE = "<|begin|><|user|>What is the capital of France?<|end|><|assistant|>"


async def test_clients_that_leave_free_everything(local):
    async def leave(delay_s, stream):
        async with httpx.AsyncClient() as client:
            body = {"prompt": "import os", "max_tokens": 1500, "ignore_eos": True, "stream": stream}
            with pytest.raises(httpx.TimeoutException):
                async with client.stream(
                    "POST", f"{local.url}/v1/completions", json=body, timeout=delay_s
                ) as response:
                    await asyncio.sleep(delay_s)
                    if not stream:
                        await response.aread()
                    raise httpx.ReadTimeout("leave")

    await asyncio.gather(*(leave(0.05 + 0.03 * i, i % 2 == 0) for i in range(20)))
    assert idle(local) is True


def test_many_at_once_equal_each_alone(local):
    import concurrent.futures

    prompts = [f"def function_{i}(" for i in range(16)]
    alone = [local.complete(p, max_tokens=24).json()["choices"][0]["text"] for p in prompts]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(
            pool.map(
                lambda p: local.complete(p, max_tokens=24).json()["choices"][0]["text"], prompts
            )
        )
    assert together == alone


def test_operators_find_their_way(local):
    assert httpx.get(f"{local.url}/health").status_code == 200
    assert httpx.get(f"{local.url}/v1/models").json()["data"][0]["max_model_len"] == 2048
    assert httpx.get(f"{local.url}/version").json()["version"]
    ready = httpx.get(f"{local.url}/ready").json()
    assert (
        ready["ready"]
        and ready["models"]["baton-tiny"]["prefill"]["ready"] == 1
        and ready["store"] == "ok"
    )
    local.complete()
    text = httpx.get(f"{local.url}/metrics").text
    from core import metrics

    # No certificate here, and the path is forced, so that no placement had another to regret.
    without_cause = {metrics.CERTIFICATE_ENDS, metrics.PLACEMENT_REGRET}
    for metric in metrics.ALL:
        assert (metric.name in text) is (metric not in without_cause), metric.name
    assert 'outcome="finished"' in text


def test_health_and_reflection(local):
    with grpc.insecure_channel(local.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "baton.v1.Generation"):
            assert (
                health.Check(health_pb2.HealthCheckRequest(service=name)).status
                == health_pb2.HealthCheckResponse.SERVING
            )
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        names = [
            s.name
            for s in next(
                reflection.ServerReflectionInfo(iter([request]))
            ).list_services_response.service
        ]
    assert "baton.v1.Generation" in names


def test_status_and_generate_commands(local):
    replicas = local.status()
    assert {r["role"] for r in replicas} == {"prefill", "decode"}
    for r in replicas:
        assert {"role", "tier", "pid", "rank_pids", "node", "address", "state", "load"} <= set(r)
        assert r["state"] == "live" and len(r["rank_pids"]) == 1
    command = [
        sys.executable,
        "-m",
        "cli.main",
        "generate",
        FRANCE,
        "--grpc",
        local.grpc,
        "-o",
        "json",
    ]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert answer["text"] == "The capital of France is Paris." and answer["timing"]["path"] == "pd"


def test_the_doctor_measures_every_link(local):
    links = httpx.get(f"{local.url}/links").json()["links"]
    assert (
        [x["transport"] for x in links] == ["shm"] * len(links)
        and links
        and not any(x["error"] for x in links)
    )
    command = [sys.executable, "-m", "cli.main", "doctor", "--url", local.url]
    for _ in range(2):  # what the first run has left in the caches must not help the second
        done = subprocess.run(
            [*command, "--mib", "2", "-o", "json"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout)
    assert {(x["prefill"], x["decode"]) for x in tree["links"]} == {
        (x["prefill"], x["decode"]) for x in links
    }
    assert all(x["gb_per_s"] > 0 and x["error"] is None for x in tree["links"])
    sizes = [p["kv_bytes"] / p["tokens"] for p in tree["prompts"]]
    assert sizes and len(set(sizes)) == 1, "every prompt was new, so all of it travelled"
    assert httpx.get(f"{local.url}/links").json()["links"][0]["gb_per_s"] > 0, (
        "what was measured is remembered"
    )
    for body, word in (({"mib": 0}, "mib"), ({"mib": 1000}, "mib"), ({"mib": "x"}, "mib")):
        reply = httpx.post(f"{local.url}/links", json=body)
        assert reply.status_code == 400 and word in reply.text
    lost = subprocess.run(
        [sys.executable, "-m", "cli.main", "doctor", "--url", "http://127.0.0.1:1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert lost.returncode == 2 and "no router answers" in lost.stderr


def test_nothing_is_held_at_the_end(local):
    assert idle(local) is True
