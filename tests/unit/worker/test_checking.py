"""What a worker believes of what routers and peers tell it: nothing that cannot be."""

from dataclasses import replace

import pytest

from core.clocks import SystemClock
from core.errors import InvalidRequest, KVTransferError
from core.ids import Incarnation, RequestId, TransferId, WorkerId
from core.ports import StreamClosed
from core.session import ConnectPeers, Hello, OfferPrefix, PrefixSource, Submit, Task, Wanted
from core.types import GenerateRequest, Logprob, SamplingParams
from protos.baton.internal.v1 import session_pb2 as pb
from transport.session_streams import _decode_up
from worker import session_server
from worker.attempt import Attempt
from worker.checking import (
    check_credit,
    check_first_tokens,
    check_hello,
    check_offer,
    check_peers,
    check_submit,
)
from worker.router_session import RouterSession, RouterSessions
from worker.session_server import SessionServer

ROWS = 100
LONGEST = 8
NAN = float("nan")
REQUEST = GenerateRequest(
    RequestId("r"), "m", (1, 2, ROWS - 1), SamplingParams(n=2, max_tokens=4), 7, 10.0, (0,)
)
SUBMIT = Submit(REQUEST, 0, Task.LOCAL, ((1, 2, 3, 4), ()), (0,))
HAND_OVER = replace(
    SUBMIT,
    task=Task.DECODE,
    transfer_id=TransferId(b"t" * 16),
    peer_id=WorkerId("p"),
    peer_incarnation=Incarnation(1),
    peer_address="grpc=127.0.0.1:9",
)

SOURCE = PrefixSource(TransferId(b"t" * 16), "grpc=127.0.0.1:9", 2, 0.5)
OFFER = OfferPrefix(SOURCE.transfer_id, (1, 2, 3), "s", WorkerId("w"), Incarnation(1))


def fetching(**changes):
    return replace(SUBMIT, prefix_source=replace(SOURCE, **changes))


def request(**changes):
    return replace(SUBMIT, request=replace(REQUEST, **changes))


def sampling(**changes):
    return request(sampling=replace(REQUEST.sampling, **changes))


def refusal(submit):
    with pytest.raises(InvalidRequest) as caught:
        check_submit(submit, ROWS)
    return caught.value.field


@pytest.mark.parametrize(
    "submit",
    [
        SUBMIT,
        HAND_OVER,
        replace(HAND_OVER, task=Task.PREFILL, peer_address=""),
        fetching(wait_s=60.0),
        sampling(stop_token_ids=tuple(range(32)), bad_words=((ROWS - 1,),), top_k=ROWS),
        request(deadline_at=-5.0, seed=2**64 - 1, scope="s" * 1024),
    ],
)
def test_what_routers_say_is_taken(submit):
    check_submit(submit, ROWS)


@pytest.mark.parametrize(
    ("field", "submit"),
    [
        ("prompt", request(token_ids=())),
        ("prompt", request(token_ids=(1, ROWS, 2))),
        ("prompt", request(token_ids=(1, 2**31, 2))),
        ("temperature", sampling(temperature=NAN)),
        ("n", sampling(n=9)),
        ("max_tokens", sampling(max_tokens=0)),
        ("bad_words", sampling(bad_words=((),))),
        ("bad_words", sampling(bad_words=((1, ROWS),))),
        ("bad_words", sampling(bad_words=((1,) * 2049,))),
        ("stop_token_ids", sampling(stop_token_ids=(ROWS,))),
        ("stop_token_ids", sampling(stop_token_ids=(1,) * 33)),
        ("eos_token_ids", request(eos_token_ids=(ROWS,))),
        ("eos_token_ids", request(eos_token_ids=(1,) * 257)),
        ("finished_choices", replace(SUBMIT, finished_choices=(2,))),
        ("finished_choices", replace(SUBMIT, finished_choices=(0, 1))),
        ("emitted", replace(SUBMIT, emitted=((),))),
        ("emitted", replace(SUBMIT, emitted=((1,) * 5, ()))),
        ("emitted", replace(SUBMIT, emitted=((), (ROWS,)))),
        ("model", request(model="m" * 257)),
        ("scope", request(scope="s" * 1025)),
        ("tier", request(tier="t" * 257)),
        ("seed", request(seed=2**64)),
        ("time_left_s", request(deadline_at=float("inf"))),
        ("time_left_s", request(deadline_at=NAN)),
        ("age_s", replace(SUBMIT, age_s=NAN)),
        ("age_s", replace(SUBMIT, age_s=1e6)),
        ("credit", replace(SUBMIT, credit=-1)),
        ("epoch", replace(SUBMIT, epoch=2**32)),
        ("transfer_id", replace(HAND_OVER, transfer_id=b"")),
        ("transfer_id", replace(HAND_OVER, transfer_id=b"t" * 17)),
        ("peer_id", replace(HAND_OVER, peer_id="")),
        ("peer_id", replace(HAND_OVER, peer_id="p" * 257)),
        ("peer_address", replace(HAND_OVER, peer_address="a" * 1025)),
        ("transfer_id", fetching(transfer_id=b"t")),
        ("peer_address", fetching(peer_address="a" * 1025)),
        ("num_tokens", fetching(num_tokens=0)),
        ("num_tokens", fetching(num_tokens=3)),
        ("wait_s", fetching(wait_s=61.0)),
        ("wait_s", fetching(wait_s=NAN)),
    ],
)
def test_a_submit_that_cannot_be_is_refused_by_its_field(field, submit):
    assert refusal(submit) == field


def test_credits_greetings_and_introductions_have_bounds_too():
    check_credit((0, 1), REQUEST)
    check_hello(Hello("router", (Wanted("r", 0, (0,)),) * 65_536))
    check_peers(ConnectPeers(("a" * 1024,) * 512))
    refused = [
        (lambda: check_credit((2,), REQUEST), "finished_choices"),
        (lambda: check_hello(Hello("")), "router_id"),
        (lambda: check_hello(Hello("router", (Wanted("r", 0, (0,)),) * 65_537)), "wanted"),
        (lambda: check_peers(ConnectPeers(("a",) * 513)), "addresses"),
        (lambda: check_peers(ConnectPeers(("a" * 1025,))), "addresses"),
    ]
    for check, field in refused:
        with pytest.raises(InvalidRequest) as caught:
            check()
        assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("transfer_id", {"transfer_id": b""}),
        ("receiver_id", {"receiver_id": ""}),
        ("receiver_id", {"receiver_id": "w" * 257}),
        ("scope", {"scope": "s" * 1025}),
        ("token_ids", {"token_ids": (1, ROWS)}),
        ("token_ids", {"token_ids": (1,) * (LONGEST + 1)}),
    ],
)
def test_an_offer_that_cannot_be_is_refused_by_its_field(field, changes):
    check_offer(OFFER, ROWS, LONGEST)
    check_offer(replace(OFFER, token_ids=(1,) * LONGEST), ROWS, LONGEST)
    with pytest.raises(InvalidRequest) as caught:
        check_offer(replace(OFFER, **changes), ROWS, LONGEST)
    assert caught.value.field == field


def test_first_tokens_of_a_hand_over_are_the_models():
    check_first_tokens([Logprob(ROWS - 1, -1.0, ((0, -1.0),) * 20)], ROWS)
    for wrong in (
        Logprob(ROWS, -1.0),
        Logprob(-1, -1.0),
        Logprob(1, -1.0, ((ROWS, -1.0),)),
        Logprob(1, -1.0, ((0, -1.0),) * 21),
    ):
        with pytest.raises(KVTransferError, match="first token"):
            check_first_tokens([Logprob(1, -1.0), wrong], ROWS)


def test_a_reconnect_says_how_far_every_choice_has_come():
    attempt = Attempt("router", SUBMIT)
    attempt.append(1, 0, Logprob(5, -1.0))
    attempt.logs[1].num_sent = 1
    for positions in ((0,), (0, 0, 0), ()):
        with pytest.raises(InvalidRequest, match="next_positions"):
            attempt.rewind(Wanted("r", 0, positions))
    assert attempt.logs[1].num_sent == 1
    attempt.rewind(Wanted("r", 0, (4, 0)))
    assert attempt.logs[1].num_sent == 0


LONG = "i" * 161


@pytest.mark.parametrize(
    "message",
    [
        pb.ToWorker(submit=pb.Submit(request_id="r", task="rm -rf" * 1000)),
        pb.ToWorker(submit=pb.Submit(request_id=LONG, task="local")),
        pb.ToWorker(cancel=pb.Cancel(request_id=LONG)),
        pb.ToWorker(credit=pb.Credit(request_id=LONG)),
        pb.ToWorker(hello=pb.Hello(router_id=LONG)),
        pb.ToWorker(hello=pb.Hello(router_id="r", wanted=[pb.Wanted(request_id=LONG)])),
    ],
)
async def test_a_message_without_the_shape_of_one_ends_its_stream_with_one_short_line(
    message, caplog
):
    with pytest.raises(StreamClosed, match="is malformed"):
        _decode_up(message.SerializeToString())
    with pytest.raises(StreamClosed, match="is malformed"):
        _decode_up(b"\xff" + message.SerializeToString())
    assert len(caplog.messages) == 2 and all(len(line) < 400 for line in caplog.messages)
    assert not any(record.exc_info for record in caplog.records)


async def test_a_router_that_does_not_read_of_ends_is_cut(monkeypatch):
    monkeypatch.setattr(session_server, "MAX_UNSENT_ENDS", 3)
    server = SessionServer(None, RouterSessions(None), None, None, SystemClock(), lambda: 0)
    session = RouterSession("router", lambda *told: None)
    for _ in range(3):
        server._refuse(session, SUBMIT, InvalidRequest("n", "is 9"))
    with pytest.raises(StreamClosed, match="does not read"):
        server._refuse(session, SUBMIT, InvalidRequest("n", "is 9"))
    assert len(session.unknown) == 3


async def test_routers_have_a_number(monkeypatch, caplog):
    monkeypatch.setattr(session_server, "MAX_ROUTERS", 2)
    sessions = RouterSessions(None)
    server = SessionServer(None, sessions, None, None, SystemClock(), lambda: 0)
    for name in ("a", "b"):
        assert server._is_welcome(Hello(name))
        sessions.of(name)
    assert server._is_welcome(Hello("a")) and not server._is_welcome(Hello("c"))
    assert "that of router no. 3" in caplog.text
