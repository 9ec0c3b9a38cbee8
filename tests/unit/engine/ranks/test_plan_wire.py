"""News alone travels to ranks, and they work from exactly what a whole plan would have said."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InternalError
from core.plan import History, SampleSpec, StepItem, StepPlan, StepResult
from core.types import GenerateRequest, Logprob, SamplingParams
from engine.model.rank_memory import GrowingInts, TokenHistory
from engine.ranks.plan_wire import PLAN, PlanDecoder, PlanEncoder
from engine.ranks.rank_wire import FROM_RANK, Executed, pack, unpack
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.block_tables import Limits
from engine.scheduling.scheduler import Scheduler

VOCABULARY = 50
PARAMS = SamplingParams(temperature=0.7, top_k=5, top_p=0.9, logprobs=2)
SAMPLE = SampleSpec(0, 0, 1, PARAMS)


def travel(encoder, decoder, plan):
    """What arrives, and how many bytes it took."""
    message = pack(encoder.encode(plan))
    return decoder.decode(unpack(message[4:], PLAN)), len(message)


def whole(plan, size):
    """A plan by value, reduced to what its readers may look at."""

    def history(h):
        if h is None:
            return None
        prompt = set(h.token_ids[h.start : h.num_prompt_tokens])
        output = Counter(h.token_ids[h.num_prompt_tokens : h.num_tokens])
        return prompt | set(output), output

    def item(i):
        end = i.start + len(i.token_ids)
        samples = [(replace(s, history=None), history(s.history)) for s in i.samples]
        table = list(i.block_table[: -(-end // size)])
        return (
            i.sequence_key,
            i.start,
            i.token_ids,
            table,
            samples,
            i.targets,
            i.num_target_logprobs,
        )

    items = [item(i) for i in plan.items]
    return plan.step_id, items, plan.copies, plan.report_layers, plan.arrived


def counts_of(history):
    """What sampling reads of a history that arrived."""
    ids, counts = history.token_ids.distinct()
    seen = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    return set(seen), Counter({i: n for i, n in seen.items() if n})


def request(name, prompt, **sampling):
    params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **sampling})
    return GenerateRequest(name, "m", tuple(prompt), params, 5, 0.0, (0,))


wishes = st.lists(
    st.builds(
        dict,
        size=st.integers(1, 30),
        max_tokens=st.integers(1, 20),
        n=st.integers(1, 3),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        frequency_penalty=st.sampled_from([0.0, 0.5]),
        allowed_token_ids=st.sampled_from([(), (3, 4, 5)]),
        shared=st.booleans(),
        arrives=st.booleans(),
    ),
    min_size=1,
    max_size=7,
)
KINDS = {"arrival", "preemption", "copy on write", "starts again", "fork", "death", "cancel"}


def test_what_arrives_is_the_plan_whatever_the_scheduler_did():
    seen_kinds: Counter = Counter()

    @settings(max_examples=80, deadline=None)
    @given(
        wishes=wishes,
        budget=st.integers(1, 40),
        num_blocks=st.integers(18, 36),
        size=st.sampled_from([2, 4, 8]),
        seed=st.integers(0, 10_000),
    )
    def check(wishes, budget, num_blocks, size, seed):
        """Chunks, decode, forks, copies, preemption, arrivals, cancels, deaths of the group."""
        chance = random.Random(seed)
        pool = BlockPool(num_blocks)
        scheduler = Scheduler(pool, Limits(size, budget, 6, 400, True), "d")
        encoder = PlanEncoder(size)
        decoder = PlanDecoder(size, VOCABULARY)
        coming = []
        for number, wish in enumerate(wishes):
            wish = dict(wish)
            length, shared, arrives = wish.pop("size"), wish.pop("shared"), wish.pop("arrives")
            prompt = [(i if shared else i * 7 + number) % VOCABULARY for i in range(length)]
            asked = request(f"r{number}", prompt, **wish)
            total = -(-(length + wish["max_tokens"]) // size) + wish["n"]
            if total <= num_blocks:
                coming.append((asked, arrives))
        alive = []
        given_up = set()
        num_steps = 0
        while coming or scheduler.has_work:
            num_steps += 1
            assert num_steps < 4000
            if coming and chance.random() < 0.5:
                asked, arrives = coming.pop()
                choices = tuple(range(asked.sampling.n))
                sequence = scheduler.new_sequence(asked, 1, choices, (), 0.0)
                if arrives:
                    scheduler.submit_arrival(sequence)
                    scheduler.reserve_in_turn(0.0)
                else:
                    scheduler.submit(sequence)
                    alive.append(sequence)
            for sequence in list(scheduler.arriving.values()):
                firsts = {c: Logprob(chance.randrange(VOCABULARY), 0.0) for c in sequence.choices}
                scheduler.attach(sequence, firsts, 0.0)
                seen_kinds["arrival"] += 1
            before = scheduler.num_preemptions
            plan = scheduler.plan(0.0)
            seen_kinds["preemption"] += scheduler.num_preemptions - before
            seen_kinds["copy on write"] += len(plan.copies)
            given_up.update(plan.released)
            seen_kinds["starts again"] += any(i.sequence_key in given_up for i in plan.items)
            seen_kinds["fork"] += any(len(i.samples) > 1 for i in plan.items)
            if not plan.items:
                continue
            got, _ = travel(encoder, decoder, plan)
            assert whole(got, size) == whole(plan, size)
            for item in got.items:
                for sample in item.samples:
                    if sample.history is not None:
                        seen, output = whole(got, size)[1][got.items.index(item)][4][0][1]
                        assert counts_of(sample.history) == (seen, output)
            if chance.random() < 0.02:
                scheduler.fail_all()
                encoder = PlanEncoder(size)
                decoder = PlanDecoder(size, VOCABULARY)
                seen_kinds["death"] += 1
                continue
            if alive and chance.random() < 0.05:
                scheduler.cancel(alive.pop(chance.randrange(len(alive))))
                seen_kinds["cancel"] += 1
            tokens = {
                (i.sequence_key, s.choice): Logprob(chance.randrange(VOCABULARY), 0.0)
                for i in plan.items
                for s in i.samples
            }
            scheduler.commit(plan, StepResult(plan.step_id, tokens), 0.0)
        last = scheduler.new_sequence(request("last", [1], max_tokens=1), 1, (0,), (), 0.0)
        scheduler.submit(last)
        travel(encoder, decoder, scheduler.plan(0.0))
        assert len(encoder) == len(decoder) == 1  # of all that came and went, nothing is kept

    check()
    assert set(+seen_kinds) == KINDS


def history(tokens, num_prompt, start=0):
    return History(tokens, start, num_prompt, len(tokens))


def decode_step(step_id, tokens, table, num_prompt, **params):
    params = replace(PARAMS, repetition_penalty=1.2, **params)
    sample = SampleSpec(0, step_id, 1, params, history=history(tokens, num_prompt))
    item = StepItem(7, len(tokens) - 1, (tokens[-1],), table, (sample,))
    return StepPlan(step_id, (item,))


@pytest.mark.parametrize("length", [100, 30_000])
def test_a_decode_step_costs_the_same_bytes_whatever_the_context(length):
    encoder = PlanEncoder(16)
    decoder = PlanDecoder(16, VOCABULARY)
    tokens = [i % VOCABULARY for i in range(length)]
    table = list(range(length // 16 + 2))
    allowed = tuple(range(VOCABULARY))
    first = decode_step(1, tokens, table, length - 1, allowed_token_ids=allowed)
    travel(encoder, decoder, first)
    tokens.append(3)
    plan = decode_step(2, tokens, table, length - 1, allowed_token_ids=allowed)
    got, num_bytes = travel(encoder, decoder, plan)
    assert whole(got, 16) == whole(plan, 16)
    assert num_bytes < 100


def test_a_block_that_copy_on_write_replaced_is_sent_again():
    """Somebody else took a reference on the block between two steps of its sequence."""
    encoder = PlanEncoder(4)
    decoder = PlanDecoder(4, VOCABULARY)
    tokens = [1, 2, 3, 4, 5, 6]
    table = [0, 1]
    travel(encoder, decoder, decode_step(1, tokens, table, 5))
    tokens.append(7)
    table[1] = 2
    plan = replace(decode_step(2, tokens, table, 5), copies=((1, 2),))
    assert list(travel(encoder, decoder, plan)[0].items[0].block_table) == [0, 2]


def test_a_released_key_may_stand_in_the_same_plan_with_another_table_and_history():
    encoder = PlanEncoder(4)
    decoder = PlanDecoder(4, VOCABULARY)
    travel(encoder, decoder, decode_step(1, [1, 2, 3, 4, 5, 6], [0, 1], 5))
    plan = replace(decode_step(2, [9, 8, 7, 6, 5], [5, 6], 5), released=(7,))
    assert whole(travel(encoder, decoder, plan)[0], 4) == whole(plan, 4)


def test_a_rank_that_missed_a_plan_ends_rather_than_guess():
    encoder = PlanEncoder(4)
    encoder.encode(decode_step(1, [1, 2, 3, 4, 5, 6], [0, 1], 5))
    missed = encoder.encode(decode_step(2, [1, 2, 3, 4, 5, 6, 7], [0, 1], 5))
    with pytest.raises(InternalError, match="rank that knows 0"):
        PlanDecoder(4, VOCABULARY).decode(unpack(pack(missed)[4:], PLAN))
    forgotten = encoder.encode(StepPlan(3, (), released=(7,)))
    with pytest.raises(InternalError, match="never knew"):
        PlanDecoder(4, VOCABULARY).decode(unpack(pack(forgotten)[4:], PLAN))


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("draws", None, "no parameters to draw with"),
        ("blocks", b"", "knows 0 blocks"),
        ("history", None, None),
    ],
)
def test_a_first_item_that_leaves_something_out_is_refused(field, value, match):
    delta = PlanEncoder(4).encode(decode_step(1, [1, 2, 3], [0], 2))
    setattr(delta.items[0], field, value)
    decoder = PlanDecoder(4, VOCABULARY)
    if match is None:
        assert decoder.decode(delta).items[0].samples[0].history is None
        return
    with pytest.raises(InternalError, match=match):
        decoder.decode(delta)


def test_a_history_with_a_gap_is_refused():
    delta = PlanEncoder(4).encode(decode_step(1, [1, 2, 3], [0], 2))
    delta.items[0].history.num_known_tokens = 1
    with pytest.raises(InternalError, match=r"knows 0 tokens of sequence 7"):
        PlanDecoder(4, VOCABULARY).decode(delta)


def test_a_plan_that_breaks_its_contract_is_not_sent():
    encoder = PlanEncoder(4)
    with pytest.raises(InternalError, match="has 1 blocks in a step that needs 2"):
        encoder.encode(decode_step(1, [1, 2, 3, 4, 5], [0], 4))
    encoder.encode(decode_step(1, [1, 2, 3, 4, 5], [0, 1], 4))
    with pytest.raises(InternalError, match="has to be released"):
        encoder.encode(decode_step(2, [1, 2, 3], [0, 1], 2))
    mixed = (replace(SAMPLE, history=history([1], 1)), SAMPLE)
    with pytest.raises(InternalError, match="differ in history"):
        encoder.encode(StepPlan(3, (StepItem(8, 0, (1,), [0], mixed),)))


def test_a_token_the_model_does_not_have_is_in_the_history_and_counts_for_nothing():
    encoder = PlanEncoder(4)
    decoder = PlanDecoder(4, VOCABULARY)
    got, _ = travel(encoder, decoder, decode_step(1, [1, 2**31, 3], [0], 1))
    known = got.items[0].samples[0].history
    assert list(known.token_ids) == [1, 2**31, 3]
    assert counts_of(known) == ({1, 3}, Counter({3: 1}))


def test_without_repetition_the_prompt_does_not_travel():
    encoder = PlanEncoder(4)
    decoder = PlanDecoder(4, VOCABULARY)
    asked = replace(request("r", [1, 2, 3]), sampling=replace(PARAMS, frequency_penalty=0.5))
    scheduler = Scheduler(BlockPool(8), Limits(4, 8, 6, 400, True), "d")
    sequence = scheduler.new_sequence(asked, 1, (0,), (4, 4), 0.0)
    item = StepItem(7, 4, (4,), [0, 1], sequence.sample_specs())
    got, _ = travel(encoder, decoder, StepPlan(1, (item,)))
    assert list(got.items[0].samples[0].history.token_ids) == [4, 4]


def test_growing_numbers_keep_what_stands_before_and_forget_what_stood_behind():
    numbers = GrowingInts()
    numbers.put(0, range(40))
    numbers.put(38, [1, 2, 3])
    assert numbers.view().tolist() == [*range(38), 1, 2, 3]
    numbers.put(2, [9])
    assert numbers.view().tolist() == [0, 1, 9]
    with pytest.raises(InternalError, match="from 4 on were sent to a rank that knows 3"):
        numbers.put(4, [1])
    assert numbers.view().tolist() == [0, 1, 9]


def test_a_token_twice_in_one_piece_counts_twice():
    history = TokenHistory(1, VOCABULARY)
    history.extend(np.array([3, 3, 3, 5], dtype=np.uint32))
    assert [array.tolist() for array in history.distinct()] == [[3, 5], [2, 1]]


@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=80), st.integers(0, 90), st.data())
def test_a_history_counts_the_same_in_any_pieces(tokens, num_prompt, data):
    history = TokenHistory(num_prompt, VOCABULARY)
    at = 0
    while at < len(tokens):
        end = data.draw(st.integers(at + 1, len(tokens)))
        history.extend(np.array(tokens[at:end], dtype=np.uint32))
        at = end
    ids, counts = history.distinct()
    output = Counter(tokens[num_prompt:])
    assert ids.tolist() == sorted(set(tokens))
    assert counts.tolist() == [output[i] for i in ids.tolist()]
    assert list(history) == tokens


def test_a_result_arrives_as_it_was_sent():
    top = ((3, -0.5), (4, float("-inf")))
    result = StepResult(
        9,
        tokens={(7, 0): Logprob(3, -0.5, top), (7, 1): Logprob(4, -1.5)},
        failed={8: "why"},
        scored={7: (Logprob(1, -2.0), Logprob(2, -0.25, top))},
    )
    arrived = unpack(pack(Executed(result))[4:], FROM_RANK)
    assert arrived == Executed(result)


@pytest.mark.parametrize("message", [["plan"], ["layer", 1], ["layer", "1", 2], {}, 7])
def test_a_message_of_another_shape_is_refused(message):
    body = pack(message)[4:]
    with pytest.raises(InternalError, match=f"message of {len(body)} bytes is malformed"):
        unpack(body, FROM_RANK)
    with pytest.raises(InternalError, match="is malformed"):
        unpack(body[:-1], FROM_RANK)
