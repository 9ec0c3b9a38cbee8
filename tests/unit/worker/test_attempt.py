"""What a worker's frames hold: never more than a message may, and for every attempt its share."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InternalError, StepFailed, WorkerLost
from core.session import (
    AttemptEnded,
    Credit,
    Hello,
    StepFrame,
    Submit,
    Task,
    TokenDelta,
    Wanted,
    WorkerTiming,
)
from core.types import FinishReason, GenerateRequest, Logprob, SamplingParams
from transport.to_router_codec import MAX_ERROR_CHARACTERS, from_router_wire, to_router_wire
from transport.to_worker_codec import from_worker_wire, to_worker_wire
from worker.attempt import (
    DELTA_BYTES,
    ENDED_BYTES,
    LOGPROB_BYTES,
    MIN_SHARE_BYTES,
    ROW_BYTES,
    TOKEN_BYTES,
    TOP_BYTES,
    Attempt,
    FrameShare,
)
from worker.router_session import FRAME_BYTES, RouterSession

TOP = tuple((2**32 - 1 - i, -1.5) for i in range(20))


LONG_ID = "i" * 160


TIMINGS = WorkerTiming(1.5, 2.5, 3.5, 2**31, 2**62, 2**31, "a transport's name", 2**31)


def attempt(name, num_scores=0, num_tokens=1, n=1, logprobs=20):
    sampling = SamplingParams(n=n, logprobs=logprobs, prompt_logprobs=20, max_tokens=4096)
    request = GenerateRequest(name, "m", tuple(range(num_scores + 1)), sampling, 1, 0.0)
    made = Attempt("router", Submit(request, 2**32 - 1, Task.LOCAL, ((),) * n))
    made.prompt_logprobs = tuple(Logprob(2**32 - 1, -float(i), TOP) for i in range(num_scores))
    made.timings = TIMINGS
    for choice in range(n):
        for position in range(num_tokens):
            made.append(choice, position, Logprob(2**32 - 1 - position, -2.5, TOP))
    return made


def session_of(*attempts):
    session = RouterSession("router", lambda *told: None)
    for one in attempts:
        session.attempts[one.run_id] = one
        session.touch(one)
    return session


def end(one, message=""):
    for log in one.logs.values():
        log.finish = FinishReason.LENGTH
    error = StepFailed(message) if message else None
    one.ended = AttemptEnded(one.run_id, one.epoch, Task.LOCAL, TIMINGS, error)


def frames_of(session):
    frames = []
    while (frame := session.build_frame(7)) is not None:
        frames.append(frame)
    return frames


def size_of(frame):
    return len(to_router_wire(2**40, frame).SerializeToString())


def tokens_of(frames, name, choice=0):
    found = []
    for delta in (d for f in frames for d in f.deltas if d.run_id == name):
        if delta.choice == choice:
            assert delta.position == len(found)
            found += delta.token_ids
    return found


def test_much_to_say_is_said_in_frames_of_a_bounded_size_scores_first():
    fat = attempt(LONG_ID, num_scores=4000, num_tokens=256, n=8)
    end(fat, "x" * 5000)
    frames = frames_of(session_of(fat))
    assert len(frames) > 5 and max(map(size_of, frames)) <= FRAME_BYTES
    deltas = [d for f in frames for d in f.deltas]
    scores = [s for d in deltas for s in d.prompt_logprobs]
    assert tuple(scores) == fat.prompt_logprobs
    num_known = 0
    for delta in deltas:
        assert not delta.prompt_logprobs or delta.prompt_start == num_known
        num_known += len(delta.prompt_logprobs)
        assert num_known == 4000 or not delta.token_ids
    for choice in range(8):
        assert len(tokens_of(frames, LONG_ID, choice)) == 256
    assert [d.choice for d in deltas if d.finish] == list(range(8))
    assert sum(d.timings is not None for d in deltas) == 1
    assert [len(f.ended) for f in frames] == [0] * (len(frames) - 1) + [1]


def test_one_with_much_to_say_holds_back_nobodys_tokens():
    fat = attempt("fat", num_scores=4000)
    others = [attempt(f"r{i}") for i in range(100)]
    session = session_of(fat, *others)
    first = session.build_frame(1)
    assert {d.run_id for d in first.deltas} == {"fat", *(f"r{i}" for i in range(100))}
    assert size_of(first) <= FRAME_BYTES and fat.has_unsent
    late = attempt("late")
    session.attempts["late"] = late
    session.touch(late)
    assert {d.run_id for d in session.build_frame(2).deltas} == {"fat", "late"}


def test_more_attempts_than_one_frame_has_room_for_take_turns():
    many = [attempt(f"r{i}", num_tokens=256) for i in range(300)]
    session, heard = session_of(*many), []
    while len({d.run_id for d in heard}) < 300:
        frame = session.build_frame(1)
        assert size_of(frame) <= FRAME_BYTES
        heard += frame.deltas
    assert max(sum(d.run_id == f"r{i}" for d in heard) for i in range(300)) <= 2
    heard += [d for f in frames_of(session) for d in f.deltas]
    assert all(
        sum(len(d.token_ids) for d in heard if d.run_id == f"r{i}") == 256 for i in range(300)
    )


def test_unknown_attempts_are_reported_in_frames_of_a_bounded_size():
    session = RouterSession("router", lambda *told: None)
    error = WorkerLost("the worker does not know this attempt (any more)")
    session.unknown = [
        AttemptEnded(f"{LONG_ID}{i}", 1, Task.LOCAL, TIMINGS, error) for i in range(4000)
    ]
    frames = frames_of(session)
    assert max(map(size_of, frames)) <= FRAME_BYTES and sum(len(f.ended) for f in frames) == 4000


def test_one_of_each_fits_the_smallest_share():
    one = attempt(LONG_ID, num_scores=1, num_tokens=0)
    one.append(0, 0, Logprob(2**32 - 1, -2.5, TOP))
    end(one, "\U0001f600" * 5000)
    parts = []
    while one.has_unsent:
        parts.append(one.take(MIN_SHARE_BYTES))
        wire = size_of(StepFrame(1, tuple(parts[-1].deltas), tuple(parts[-1].ended)))
        assert 0 < wire <= parts[-1].num_bytes <= MIN_SHARE_BYTES
    assert (
        sum(len(p.deltas) for p in parts)
        and size_of(StepFrame(1, (), tuple(parts[-1].ended))) <= ENDED_BYTES
    )
    wire = to_router_wire(1, StepFrame(1, (), (one.ended,)))
    assert len(wire.frame.ended[0].error_message) == MAX_ERROR_CHARACTERS


@pytest.mark.parametrize("num_tokens", range(5))
def test_the_end_of_an_attempt_waits_for_the_next_frame_if_it_has_no_room_in_this(num_tokens):
    one = attempt("r", num_tokens=num_tokens)
    end(one)
    parts = []
    while one.has_unsent:
        parts.append(one.take(MIN_SHARE_BYTES))
    room_bytes = MIN_SHARE_BYTES - DELTA_BYTES - num_tokens * ROW_BYTES
    fits = not num_tokens or room_bytes >= ENDED_BYTES
    assert [len(p.ended) for p in parts] == ([1] if fits else [0, 1])
    assert max(p.num_bytes for p in parts) <= MIN_SHARE_BYTES
    assert num_tokens < 3 or not fits, "no case of this test fills a frame"


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1500), st.integers(0, 60), st.integers(0, 1500), st.integers(0, 60))
def test_after_a_reconnect_what_is_not_there_comes_again_and_nothing_else(scores, tokens, have, at):
    one = attempt("r", num_scores=scores, num_tokens=60)
    end(one)
    session = session_of(one)
    for _ in range(tokens % 4):
        session.build_frame(1)
    have = min(have, scores)
    at = at if have == scores else 0
    one.rewind(Wanted("r", one.epoch, (at,), 0, have))
    session.touch(one)
    deltas = [d for f in frames_of(session) for d in f.deltas]
    assert [s for d in deltas for s in d.prompt_logprobs] == list(one.prompt_logprobs[have:])
    assert [t for d in deltas for t in d.token_ids] == [2**32 - 1 - i for i in range(at, 60)]


def test_timings_and_the_end_come_again_after_a_reconnect_too():
    one = attempt("r", num_tokens=3)
    end(one)
    session = session_of(one)
    told = []
    for _ in range(2):
        frames = frames_of(session)
        timings = [d.timings for f in frames for d in f.deltas]
        told.append((timings, [e.run_id for f in frames for e in f.ended]))
        one.rewind(Wanted("r", one.epoch, (3,)))
        session.touch(one)
    assert told == [([TIMINGS], ["r"])] * 2


def test_a_router_that_lacks_what_came_before_this_attempt_hears_of_it_from_its_base_on():
    one = attempt("r", num_tokens=0)
    for position in (5, 6):
        one.append(0, position, Logprob(position, -2.5))
    session = session_of(one)
    session.build_frame(1)
    one.rewind(Wanted("r", one.epoch, (3,)))
    session.touch(one)
    [delta] = [d for f in frames_of(session) for d in f.deltas]
    assert (delta.position, delta.token_ids) == (5, (5, 6))


def test_a_position_that_comes_again_stands_once_also_behind_a_base():
    """A choice that goes on where another attempt was has no token before its base."""
    one = attempt("r", num_tokens=0)
    for position in (5, 5, 6, 5, 6):
        log = one.append(0, position, Logprob(position, -2.5))
    assert [token.token_id for token in log.tokens] == [5, 6]


def test_a_choice_that_the_client_no_longer_waits_for_is_not_told_of():
    one = attempt("r", n=2, num_tokens=3)
    one.finished_choices.add(0)
    assert [d.choice for f in frames_of(session_of(one)) for d in f.deltas] == [1]


def test_parts_finished_choices_and_scores_survive_the_wire():
    delta = TokenDelta(
        "r", 1, 0, 0, (), prompt_logprobs=(Logprob(5, -1.5, ((1, -2.0),)),), prompt_start=70000
    )
    frame = StepFrame(1, (delta,))
    assert from_router_wire(to_router_wire(1, frame)) == frame
    credit = Credit("r", 1, 300, (0, 2))
    assert from_worker_wire(to_worker_wire(1, credit)) == credit
    hello = Hello("router", (Wanted("r", 1, (3, 4), 300, 70000, (1,)),))
    assert from_worker_wire(to_worker_wire(1, hello)) == hello


def cost(share):
    """What a share's parts take by the bounds, each counted once."""
    rows = [row for d in share.deltas for row in (*d.prompt_logprobs, *d.logprobs)]
    plain = sum(len(d.token_ids) for d in share.deltas if not d.logprobs)
    scored = sum(TOKEN_BYTES + LOGPROB_BYTES + TOP_BYTES * len(row.top) for row in rows)
    fixed = DELTA_BYTES * len(share.deltas) + ENDED_BYTES * len(share.ended)
    return fixed + scored + TOKEN_BYTES * plain


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 60), st.integers(1, 60), st.integers(1, 3), st.sampled_from([None, 20]),
    st.integers(MIN_SHARE_BYTES, 3 * MIN_SHARE_BYTES),
)  # fmt: skip
def test_a_share_is_counted_exactly_and_the_last_of_all_is_empty(scores, tokens, n, top, room):
    one = attempt("r", num_scores=scores, num_tokens=tokens, n=n, logprobs=top)
    end(one)
    while one.has_unsent:
        share = one.take(room)
        assert share.num_bytes == cost(share) <= room and (share.deltas or share.ended)
    assert one.take(room) == FrameShare() == FrameShare([], [], 0)


@pytest.mark.parametrize(("spare_bytes", "num_told"), [(0, 20), (-1, 19)])
def test_a_token_that_fits_to_the_last_byte_is_told(spare_bytes, num_told):
    one = attempt("r", num_tokens=30)
    share = one.take(DELTA_BYTES + 20 * ROW_BYTES + spare_bytes)
    assert len(tokens_of([share], "r")) == num_told


@pytest.mark.parametrize(("spare_bytes", "choices"), [(0, [0, 1]), (-1, [0])])
def test_a_choice_begins_where_one_token_of_it_fits(spare_bytes, choices):
    one = attempt("r", num_tokens=20, n=2)
    share = one.take(2 * DELTA_BYTES + 21 * ROW_BYTES + spare_bytes)
    assert [d.choice for d in share.deltas] == choices
    assert len(share.deltas[0].token_ids) == 20


@pytest.mark.parametrize(("spare_bytes", "num_ended"), [(0, 1), (-1, 0)])
def test_the_end_of_an_attempt_is_told_where_it_fits_to_the_last_byte(spare_bytes, num_ended):
    one = attempt("r", num_tokens=20)
    end(one)
    share = one.take(DELTA_BYTES + 20 * ROW_BYTES + ENDED_BYTES + spare_bytes)
    assert len(share.deltas[0].token_ids) == 20 and len(share.ended) == num_ended


def test_shares_that_fill_a_frame_to_the_last_byte_are_both_in_it():
    two = [attempt(name, num_tokens=1000, logprobs=None) for name in ("a", "b")]
    session = RouterSession("router", lambda *told: None, 2 * MIN_SHARE_BYTES)
    for one in two:
        session.attempts[one.run_id] = one
        session.touch(one)
    frame = session.build_frame(1)
    fitting = (MIN_SHARE_BYTES - DELTA_BYTES) // TOKEN_BYTES
    assert [(d.run_id, len(d.token_ids)) for d in frame.deltas] == [
        ("a", fitting),
        ("b", fitting),
    ]
    error = WorkerLost("unknown")
    session.unknown = [AttemptEnded(f"{i}", 1, Task.LOCAL, TIMINGS, error) for i in range(5)]
    assert [len(f.ended) for f in frames_of(session)] == [2, 2, 1]


def test_a_choice_has_not_finished_for_a_router_that_lacks_scores_of_the_prompt():
    """It has every token after a reconnect, and the end comes with the last of the scores."""
    one = attempt("r", num_scores=40, num_tokens=3)
    end(one)
    one.rewind(Wanted("r", one.epoch, (3,), 0, 0))
    deltas = []
    while one.has_unsent:
        deltas += one.take(MIN_SHARE_BYTES).deltas
    assert sum(len(d.prompt_logprobs) for d in deltas) == 40 and len(deltas) > 2
    assert [d.finish for d in deltas] == [None] * (len(deltas) - 1) + [FinishReason.LENGTH]


def test_an_attempt_that_cannot_be_put_into_a_frame_ends_alone_and_is_told_so(monkeypatch, caplog):
    bad, good = attempt("bad"), attempt("good")
    failed = []

    def fail(run_id, epoch, error):
        failed.append((run_id, epoch, type(error)))
        end(bad, error.message)
        session.touch(bad)

    session = RouterSession("router", fail)
    for one in (bad, good):
        session.attempts[one.run_id] = one
        session.touch(one)
    bad.logs[0].tokens[0] = None
    frames = frames_of(session)
    assert failed == [("bad", bad.epoch, InternalError)]
    assert "the frame of an attempt failed" in caplog.text
    assert [e.run_id for f in frames for e in f.ended] == ["bad"]
    assert {d.run_id for f in frames for d in f.deltas} == {"good"}


def test_an_ended_attempt_whose_output_breaks_is_told_as_ended():
    bad = attempt("bad")
    end(bad)
    session = RouterSession("router", lambda *told: None)  # the worker ends no attempt twice
    session.attempts["bad"] = bad
    session.touch(bad)
    bad.logs[0].tokens[0] = None
    session.wake.clear()
    assert session.build_frame(7) is None and session.wake.is_set()
    assert [e.run_id for f in frames_of(session) for e in f.ended] == ["bad"]


def test_endings_of_unknown_attempts_count_in_a_frame():
    session = session_of(attempt("fat", num_scores=5000))
    error = WorkerLost("e" * MAX_ERROR_CHARACTERS)
    session.unknown = [
        AttemptEnded(f"{LONG_ID}{i}", 1, Task.LOCAL, TIMINGS, error) for i in range(200)
    ]
    frames = frames_of(session)
    assert sum(len(f.ended) for f in frames) == 200
    bound = FRAME_BYTES - ENDED_BYTES * max(len(f.ended) for f in frames)
    first = max(frames, key=lambda f: len(f.ended))
    assert size_of(StepFrame(1, first.deltas)) <= bound
