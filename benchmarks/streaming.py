"""One greedy request through the gRPC server, timed token by token.

Owns the request and the stamps. Called by the benchmarks that measure single requests.
"""

import time

from protos.baton.v1 import generation_pb2 as pb


async def timed_stream(stub, ids, max_tokens):
    """Run a prompt of token ids; returns when it was sent, when each token came,
    and the reply's timing."""
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids),
        sampling=pb.SamplingOptions(temperature=0),
        stopping=pb.StoppingOptions(max_tokens=max_tokens, ignore_eos=True),
        response=pb.ResponseOptions(timing=True),
    )
    began, stamps, timing = time.perf_counter(), [], None
    async for message in stub.GenerateStream(request):
        kind = message.WhichOneof("event")
        if kind == "delta":
            stamps += [time.perf_counter()] * len(message.delta.tokens)
        elif kind == "summary":
            timing = message.summary.timing
    return began, stamps, timing
