"""Our kernels on a GPU beside the library's: do rows depend on their batch, and what does it cost.

1. exactness, with a model of Qwen2.5-0.5B's shape and random weights: of rows computed in a batch,
   of a prompt's chunks and of tokens decoded one by one, how many have the logits, bit for bit,
   that they have alone and in one piece
2. products and attention of the Llama-3.1-8B shape in bf16, ours and torch's: GPU time alone, by
   replaying a graph of calls, so that a slow host does not count
3. wall time of a decode step and of a prefill, host included

Run: python -m benchmarks.gpu_kernels, where torch finds a GPU.
"""

import argparse
import json
import random
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import linear

from benchmarks.handover import make_model
from benchmarks.record import save
from core.plan import StepItem
from engine.checkpoint.model_spec import read_model
from engine.model.attention import AttentionInputs, AttentionRules
from engine.model.device_attention import gathered_attention
from engine.model.model import Model
from engine.model.runner import _inputs
from engine.model.sharding import Shard
from engine.model.triton_attention import TritonAttention
from engine.model.triton_products import product
from engine.model.weights import Linear

LLAMA_8B = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}
"""Inputs and outputs of a layer's products."""
ROWS = (1, 16, 64, 128, 512, 2048)
STEPS = (
    (1, 256, 1), (1, 2048, 1), (1, 8192, 1), (8, 2048, 1), (32, 2048, 1), (128, 2048, 1),
    (1, 512, 512), (1, 2048, 2048), (1, 8192, 2048),
)  # fmt: skip
"""Sequences, positions of each and rows of each."""
NUM_OTHERS = 64
PROMPT_TOKENS = 700


def gpu_us(call, repeats=10):
    """Mean time of a call on the GPU, us."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    graph.replay()
    return 1000 * _event_ms(lambda: [graph.replay() for _ in range(3)]) / (3 * repeats)


def _event_ms(call):
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def wall_ms(call, repeats=10):
    """Mean wall time of a call that ends with its result on the host, ms."""
    call()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats * 1000


def products():
    """GPU time of each product by rows, ours and the library's, us."""
    rows = []
    for name, (inputs, outputs) in LLAMA_8B.items():
        weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) * 0.02
        for count in ROWS:
            x = torch.randn(count, inputs, device="cuda", dtype=torch.bfloat16)
            rows.append(
                {
                    "product": name,
                    "rows": count,
                    "ours_us": gpu_us(partial(product, x, weight, None)),
                    "library_us": gpu_us(partial(linear, x, weight)),
                }
            )
    return rows


def attention():
    """Time of one layer's attention, ours on the GPU alone and gathered as torch queues it, us."""
    num_heads, num_kv_heads, head_size, block = 32, 8, 128, 16
    kv = torch.randn(20000, 2, block, num_kv_heads, head_size, device="cuda", dtype=torch.bfloat16)
    rules = AttentionRules(head_size**-0.5)
    rows = []
    for sequences, positions, count in STEPS:
        width = positions // block
        tables = np.arange(sequences * width).reshape(sequences, width) % len(kv)
        places = np.concatenate([np.arange(positions - count, positions)] * sequences)
        inputs = AttentionInputs(places, np.arange(sequences + 1) * count, tables)
        q = torch.randn(
            sequences * count, num_heads, head_size, device="cuda", dtype=torch.bfloat16
        )
        ours = partial(TritonAttention(), q, kv, inputs, rules)
        gathered = partial(gathered_attention, q, kv, inputs, rules)
        gathered()
        rows.append(
            {
                "sequences": sequences,
                "positions": positions,
                "rows_of_each": count,
                "ours_us": gpu_us(ours),
                "gathered_us": 1000 * _event_ms(gathered),
            }
        )
    return rows


class Steps:
    """A model with a pool: one long prompt, and others that decode beside it."""

    def __init__(self, folder, dtype, attention):
        """Load the model and prefill the others."""
        spec = read_model(folder, dtype)
        self.model = Model(Shard(spec), torch.device("cuda"), attention)
        shape = (spec.num_layers, 1024, 2, 16, spec.num_kv_heads, spec.head_size)
        self.kv = torch.zeros(shape, dtype=self.model.dtype, device="cuda")
        rng = random.Random(3)
        self.prompt = [rng.randrange(1000, 90000) for _ in range(2048)]
        prompts = [[rng.randrange(1000, 90000) for _ in range(97)] for _ in range(NUM_OTHERS)]
        tables = [tuple(range(300 + 7 * n, 307 + 7 * n)) for n in range(NUM_OTHERS)]
        self.run([StepItem(1 + n, 0, tuple(prompts[n]), tables[n]) for n in range(NUM_OTHERS)])
        self.others = [StepItem(1 + n, 97, (7,), tables[n]) for n in range(NUM_OTHERS)]

    def run(self, items, rows=None):
        """Logits of a step on the host; by default of each sequence's last row."""
        token_ids = np.concatenate([np.asarray(item.token_ids) for item in items])
        inputs = _inputs(tuple(items))
        wanted = inputs.row_starts[1:] - 1 if rows is None else rows
        return self.model.forward(token_ids, inputs, self.kv, wanted, lambda layer: None).cpu()

    def chunk(self, begin, end):
        """Rows of the prompt."""
        return StepItem(0, begin, tuple(self.prompt[begin:end]), tuple(range(200)))


def exactness(folder):
    """By dtype and kernels: shares of rows that are bitwise what they are alone."""
    found = {}
    library = Linear.__call__
    for name, dtype, attention, call in (
        ("ours, bfloat16", "bfloat16", "triton", library),
        ("ours, float32", "float32", "triton", library),
        ("torch's, bfloat16", "bfloat16", "gathered", _by_torch),
    ):
        Linear.__call__ = call
        try:
            found[name] = _shares_and_times(Steps(folder, dtype, attention))
        finally:
            Linear.__call__ = library
    return found


def _by_torch(layer, x):
    """The library's product of all rows at once."""
    return linear(x, layer._weight, layer._bias)


def _shares_and_times(steps):
    whole = steps.run([steps.chunk(0, PROMPT_TOKENS)], np.arange(PROMPT_TOKENS))
    chunked = []
    for begin, end, beside in ((0, 200, 0), (200, 512, 9), (512, 640, 40), (640, 700, 64)):
        rows = np.arange(end - begin)
        chunked.append(steps.run([steps.chunk(begin, end), *steps.others[:beside]], rows))
    decoded = [
        steps.run([steps.chunk(at, at + 1), *steps.others[: at % 64]], np.array([0]))
        for at in range(640, PROMPT_TOKENS)
    ]
    alone = torch.cat([steps.run([item]) for item in steps.others])
    return {
        "equal_in_chunks": _share(torch.cat(chunked), whole),
        "equal_decoded_again": _share(torch.cat(decoded), whole[640:]),
        "equal_in_a_batch": _share(steps.run(steps.others), alone),
        "decode_1_ms": wall_ms(lambda: steps.run(steps.others[:1])),
        "decode_64_ms": wall_ms(lambda: steps.run(steps.others)),
        "prefill_2048_ms": wall_ms(lambda: steps.run([steps.chunk(0, 2048)])),
    }


def _share(ours, expected):
    return sum(torch.equal(a, b) for a, b in zip(ours, expected, strict=True)) / len(expected)


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "shape"
        make_model(folder)
        result = {
            "device": torch.cuda.get_device_name(0),
            "torch": torch.__version__,
            "exactness": exactness(folder),
            "products": products(),
            "attention": attention(),
        }
    save("gpu_kernels", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
