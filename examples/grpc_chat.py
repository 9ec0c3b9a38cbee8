"""A conversation over gRPC: `python examples/grpc_chat.py [ADDRESS]`.

Owns an example of the generated client: streaming, a deadline, the caller's request id, errors with
their details. Other languages generate theirs from protos/baton/v1/generation.proto.
"""

import sys

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from protos.baton.v1 import generation_pb2 as pb
from protos.baton.v1 import generation_pb2_grpc


def main():
    """Ask one question and show the answer as it comes."""
    address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9000"
    request = pb.ChatRequest(
        messages=[pb.ChatMessage(role="user", content="What is the capital of France?")],
        sampling=pb.SamplingOptions(
            temperature=0
        ),  # 0 is greedy; left out it would be the model's default
        response=pb.ResponseOptions(timing=True),
    )
    with grpc.insecure_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        try:
            # The deadline is the request's time limit; leaving the loop early would cancel it.
            for event in stub.Chat(request, timeout=30, metadata=(("x-request-id", "example"),)):
                match event.WhichOneof("event"):
                    case "delta":
                        print(event.delta.text, end="", flush=True)
                    case "summary":
                        timing = event.summary.timing
                        print(
                            f"\n{event.summary.usage.completion_tokens} tokens, TTFT "
                            f"{timing.ttft_s * 1e3:.1f} ms, path {timing.path}"
                        )
        except grpc.RpcError as error:
            print(f"{error.code().name}: {error.details()}", file=sys.stderr)
            status = rpc_status.from_call(error)
            for detail in status.details if status else ():
                bad = error_details_pb2.BadRequest()
                if detail.Unpack(bad):
                    print("field:", bad.field_violations[0].field, file=sys.stderr)
            raise SystemExit(1) from error


if __name__ == "__main__":
    main()
