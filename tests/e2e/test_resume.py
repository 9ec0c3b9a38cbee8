"""A stream cut at any event and resumed at the other router is the whole stream,
over HTTP and over gRPC."""

import json

import httpx
import pytest
from support.process_cluster import Answer, ProcessCluster, _take, config_of

from client.stream import Client
from protos.baton.v1 import generation_pb2 as pb

BODY = {
    "prompt": "def main(argv):\n    for",
    "max_tokens": 24,
    "temperature": 1,
    "n": 2,
    "stream": True,
    "ignore_eos": True,
}
CHAT = {
    "messages": [{"role": "user", "content": "def main("}],
    "max_tokens": 16,
    "temperature": 0,
    "stream": True,
}


def url(cluster, router, path):
    return f"http://127.0.0.1:{cluster.local.addresses[router][0]}{path}"


async def read(cluster, router, path, body, headers, limit=10**6):
    """Read at most so many events; returns (chunks, last event id)."""
    chunks, last_id = [], ""
    async with httpx.AsyncClient(timeout=30) as http:
        async with http.stream(
            "POST", url(cluster, router, path), json=body, headers=headers
        ) as reply:
            assert reply.status_code == 200, await reply.aread()
            event = {}
            async for line in reply.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                elif line.startswith("id: "):
                    last_id = line[4:]
                elif not line and event:
                    chunks.append(event)
                    event = {}
                    if len(chunks) == limit:
                        break
    return chunks, last_id


def joined(chunks):
    out = {}
    for chunk in chunks:
        for c in chunk["choices"]:
            text, roles, ends = out.setdefault(c["index"], ["", [], []])
            delta = c.get("delta", {})
            out[c["index"]] = [
                text + (c.get("text") or delta.get("content") or ""),
                roles + [delta.get("role")] * ("role" in delta),
                ends + [c["finish_reason"]] * (c["finish_reason"] is not None),
            ]
    return out


@pytest.mark.sampled(2)
@pytest.mark.timeout(240)
async def test_streams_resume_at_another_router_wherever_they_were_cut():
    async with ProcessCluster(config_of()) as cluster:
        for path, body in (("/v1/completions", BODY), ("/v1/chat/completions", CHAT)):
            ids = {"idempotency-key": "whole", "x-baton-event-ids": "1"}
            whole, _ = await read(cluster, 0, path, body, ids)
            assert len(whole) > 6
            for cut in (1, 2, len(whole) // 2, len(whole) - 1, len(whole)):
                first, last_id = await read(cluster, 0, path, body, ids, cut)
                # cut before any id came: a client has nothing to come back with, and begins anew
                if not last_id:
                    first = []
                rest, _ = await read(cluster, 1, path, body, {**ids, "last-event-id": last_id})
                assert joined(first + rest) == joined(whole), (path, cut, last_id)
        plain, last_id = await read(cluster, 0, "/v1/completions", BODY, {})
        assert last_id == "" and joined(plain), "ids are off unless asked for"
        await wrong_ids_are_refused(cluster)
        await over_grpc(cluster)
        assert await cluster.leaked() == {}


async def wrong_ids_are_refused(cluster):
    async with httpx.AsyncClient(timeout=30) as http:
        for event_id, changes in (
            ("nonsense", {}),
            ("r:1", {}),
            ("r:1,2,3", {}),
            ("r:1,99", {}),
            ("r:1,1", {"stream": False}),
        ):
            reply = await http.post(
                url(cluster, 0, "/v1/completions"),
                json={**BODY, **changes},
                headers={"last-event-id": event_id},
            )
            assert reply.status_code == 400, (event_id, reply.text)


async def over_grpc(cluster):
    """With and without the tokens; a lie about them harms its own answer only."""
    request = pb.GenerateRequest(
        text=BODY["prompt"],
        request_id="grpc",
        sampling=pb.SamplingOptions(temperature=1, n=2),
        stopping=pb.StoppingOptions(max_tokens=24, ignore_eos=True),
        response=pb.ResponseOptions(logprobs=1),
    )
    whole = Answer()
    async with Client(cluster.addresses) as client:
        async for message in client.generate(request):
            _take(whole, message)
        for have in ((0, 0), (1, 5), (24, 3), (26, 26)):
            for says_tokens in (False, True):
                again = pb.GenerateRequest()
                again.CopyFrom(request)
                again.resume_from.positions.extend(have)
                if says_tokens:
                    again.resume_from.tokens.extend(
                        pb.TokenIds(ids=whole.tokens[c][: have[c]]) for c in (0, 1)
                    )
                rest = {0: [], 1: []}
                async for message in client.generate(again):
                    if message.WhichOneof("event") == "delta":
                        rest[message.delta.choice] += [
                            (t.token_id, t.logprob) for t in message.delta.tokens
                        ]
                for c in (0, 1):
                    expected = list(
                        zip(whole.tokens[c], (p for p, _ in whole.logprobs[c]), strict=True)
                    )[have[c] :]
                    assert rest[c] == expected, (have, says_tokens, c)
        lie = pb.GenerateRequest()
        lie.CopyFrom(request)
        lie.resume_from.positions.extend((3, 3))
        lie.resume_from.tokens.extend(pb.TokenIds(ids=[5, 6, 7]) for _ in (0, 1))
        with pytest.raises(Exception, match="which is wrong"):
            async for _ in client.generate(lie):
                pass
