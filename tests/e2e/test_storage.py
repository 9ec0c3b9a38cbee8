"""A worker process that is killed finds on its disk what it had computed before."""

import os
import random
import re
import signal
import time

import grpc
import httpx
import pytest
import yaml

from protos.baton.v1 import generation_pb2 as pb
from protos.baton.v1 import generation_pb2_grpc

RNG = random.Random(12)
PROMPTS = [tuple(RNG.randrange(256) for _ in range(250)) for _ in range(4)]
"""15 full blocks each; the pool holds those of two."""


def ask(stub, prompt):
    """Return the tokens, and how many of the prompt were cached."""
    reply = stub.Generate(
        pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingOptions(temperature=0),
            stopping=pb.StoppingOptions(max_tokens=8, ignore_eos=True),
            response=pb.ResponseOptions(timing=True),
        ),
        timeout=120,
    )
    return [t.token_id for t in reply.choices[0].tokens], reply.usage.cached_tokens


def wait_for_another_worker(up, old_pid):
    ends_at = time.monotonic() + 120
    while time.monotonic() < ends_at:
        found = [row["pid"] for row in up.status() if row["role"] == "decode"]
        if found and found != [old_pid]:
            return
        time.sleep(0.2)
    raise AssertionError("the worker was not replaced")


@pytest.mark.sampled(2)
def test_a_killed_worker_finds_its_blocks_on_disk(start, tmp_path):
    path = tmp_path / "baton.yaml"
    folder = tmp_path / "blocks"
    engine = {"block_size_tokens": 16, "num_blocks": 40}
    tree = {
        "model": {"dtype": "float32"},
        "pools": {"prefill": {"engine": engine}, "decode": {"engine": engine}},
        "placement": {"path": "local"},
        "colocated": True,
        "prefix_cache": {"disk_bytes": 1 << 26, "disk_folder": str(folder)},
    }
    path.write_text(yaml.safe_dump(tree))
    up = start("--local", "--config", str(path))
    with grpc.insecure_channel(up.grpc) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        cold = [ask(stub, prompt) for prompt in PROMPTS]
        assert [cached for _, cached in cold] == [0] * len(PROMPTS)
        [old_pid] = [row["pid"] for row in up.status()]
        # Until the last block is written that the pool is to evict.
        ask(stub, PROMPTS[0])
        time.sleep(2)
        os.kill(old_pid, signal.SIGKILL)
        wait_for_another_worker(up, old_pid)
        again = [ask(stub, prompt) for prompt in PROMPTS]
        assert [tokens for tokens, _ in again] == [tokens for tokens, _ in cold]
        # A busy machine may find computing cheaper, but not for all of them.
        assert max(cached for _, cached in again) >= 14 * 16
        # A worker reports twice a second.
        time.sleep(1.5)
        metrics = httpx.get(f"{up.url}/metrics").text
        shown = dict(re.findall(r'^baton_storage_(\w+)\{storage="disk"\} (\S+)$', metrics, re.M))
        assert float(shown["blocks"]) >= 30 and float(shown["hit_blocks"]) >= 14
        [segment] = folder.rglob("*.kv")
        assert segment.stat().st_mode & 0o077 == 0
    assert up.end() == (0, set())
