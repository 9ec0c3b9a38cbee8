"""Pools whose blocks differ, from a config file to the tokens of transformers in one process."""

import functools
import random

import grpc
import pytest
import torch
import yaml
from support.models import TINY
from transformers import AutoModelForCausalLM

from protos.baton.v1 import generation_pb2 as pb
from protos.baton.v1 import generation_pb2_grpc

MAX_TOKENS = 40
RNG = random.Random(11)
PROMPTS = [
    tuple(b"def main(argv):\n    "),
    tuple(RNG.randrange(256) for _ in range(75)),
    tuple(RNG.randrange(256) for _ in range(150)),
]


@functools.cache
def of_one_process(prompt):
    """Greedy tokens of a prompt, by one thread: on a busy machine two would wait for each other."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),  # else it would take the padding's id for padding
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0].tolist()[len(prompt) :]


def ask(stub, prompt):
    return stub.Generate(
        pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingOptions(temperature=0),
            stopping=pb.StoppingOptions(max_tokens=MAX_TOKENS, ignore_eos=True),
            response=pb.ResponseOptions(timing=True),
        ),
        timeout=60,
    )


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("prefill", "decode"), [(32, 16), (16, 32)])
def test_pools_of_different_blocks_answer_like_one_process(prefill, decode, start, tmp_path):
    path = tmp_path / "baton.yaml"
    tree = {
        "model": {"dtype": "float32"},
        "pools": {
            "prefill": {"engine": {"block_size_tokens": prefill, "num_blocks": 4096 // prefill}},
            "decode": {"engine": {"block_size_tokens": decode, "num_blocks": 4096 // decode}},
        },
        "placement": {"path": "pd"},
    }
    path.write_text(yaml.safe_dump(tree))
    up = start("--local", "--config", str(path))
    with grpc.insecure_channel(up.grpc) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        for prompt in PROMPTS:
            for is_again in (False, True):
                reply = ask(stub, prompt)
                assert [t.token_id for t in reply.choices[0].tokens] == of_one_process(prompt)
                timing = reply.timing
                assert (timing.path, len(timing.attempts)) == ("pd", 1), timing
                # Hits are of whole blocks, where the prompt is computed.
                cached = (len(prompt) - 1) // prefill * prefill if is_again else 0
                assert (timing.cached_tokens, reply.usage.cached_tokens) == (cached, cached)
                # What decode has is not sent.
                have = (len(prompt) - 1) // decode if is_again else 0
                assert timing.kv_blocks == -(-len(prompt) // decode) - have
                assert timing.kv_bytes > 0
    loads = {r["role"]: r["load"]["total_blocks"] for r in up.status()}
    assert loads == {"prefill": 4096 // prefill, "decode": 4096 // decode}
    assert up.end() == (0, set())
