"""Answers over gRPC: what is in them, and as what."""

from google.protobuf.json_format import MessageToDict

from core.types import RequestTiming
from protos.baton.v1 import generation_pb2 as pb
from router.grpc.replies import timing
from router.http.formatters import timing_body

WHY = {
    "decision": {"path": "pd", "prefill_worker": "p1", "uncached_tokens": 200},
    "candidates": [{"path": "pd", "worker": "p1", "cached_tokens": 48, "total_ms": 1.5}],
}
TIMING = RequestTiming(ttft_s=0.25, cached_tokens=48, attempts=("0:pd:ok",), why=WHY)


def test_a_reply_says_why_a_request_went_where_it_did_as_over_http():
    asked = pb.GenerateRequest(response=pb.ResponseOptions(timing=True))
    found = pb.Timing.FromString(timing(asked, TIMING).SerializeToString())
    assert MessageToDict(found.why) == WHY == timing_body(TIMING)["why"]
    assert (found.ttft_s, found.cached_tokens) == (0.25, 48)
    assert found.why["decision"]["uncached_tokens"] == 200


def test_a_reply_that_was_not_asked_for_its_timing_says_nothing_of_it():
    assert timing(pb.GenerateRequest(), TIMING) is None
