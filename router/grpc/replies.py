"""Answers as proto messages: how a choice ended, what it took, where the time went.

Owns the fields of these messages. Does not know calls or streams.
"""

from __future__ import annotations

from google.protobuf.struct_pb2 import Struct

from core.types import ChoiceFinished, FinishReason, RequestTiming, Usage
from protos.baton.v1 import generation_pb2 as pb

REASONS = {FinishReason.STOP: pb.FINISH_REASON_STOP, FinishReason.LENGTH: pb.FINISH_REASON_LENGTH}


def finished(event: ChoiceFinished) -> pb.Finished:
    """How a choice ended."""
    out = pb.Finished(choice=event.choice, reason=REASONS[event.reason], position=event.position)
    if isinstance(event.stop_match, str):
        out.stop_string = event.stop_match
    elif event.stop_match is not None:
        out.stop_token_id = event.stop_match
    return out


def usage(counted: Usage) -> pb.Usage:
    """Token counts."""
    return pb.Usage(
        prompt_tokens=counted.prompt_tokens,
        completion_tokens=counted.completion_tokens,
        total_tokens=counted.prompt_tokens + counted.completion_tokens,
        cached_tokens=counted.cached_tokens,
        cost=counted.cost,
    )


def timing(request: pb.GenerateRequest | pb.ChatRequest, a: RequestTiming) -> pb.Timing | None:
    """Where the time went, if the request asks for it."""
    if not request.response.timing:
        return None
    phases = {f"{name}_s": seconds for name, seconds in a.phases().items()}
    why = Struct()
    why.update(a.why)
    return pb.Timing(
        **phases,
        ttft_s=a.ttft_s,
        e2e_s=a.e2e_s,
        kv_bytes=a.kv_bytes,
        kv_blocks=a.kv_blocks,
        path=a.path,
        prefill_worker=a.prefill_worker,
        decode_worker=a.decode_worker,
        prefill_pid=a.prefill_pid,
        decode_pid=a.decode_pid,
        attempts=a.attempts,
        cached_tokens=a.cached_tokens,
        kv_transport=a.kv_transport,
        kv_parts_healed=a.kv_fragments_resent,
        why=why,
    )
