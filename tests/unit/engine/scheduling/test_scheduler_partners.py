"""Hand-overs and their partners: who is asked, when, and what runs ahead."""

from support.stepping import SMALL, Engine, hand_over, lengths, request

from engine.scheduling.events import Announced
from engine.scheduling.queues import MAX_READY, MAX_UNANSWERED
from engine.scheduling.sequence import Status
from simulation.wait_reasons import WaitReason, wait_reason_of

# --- hand-overs -----------------------------------------------------------------------------------


def test_a_partner_that_does_not_answer_holds_up_its_own_hand_overs_alone():
    engine = Engine(num_blocks=18, cache=False)
    for i in range(3 * MAX_UNANSWERED):
        hand_over(engine, f"silent{i}", "silent")
    healthy = hand_over(engine, "healthy", "healthy")
    engine.scheduler.plan(0.0)
    announced = [e.sequence.handover.partner for e in engine.scheduler.take_events()]
    assert announced.count("silent") == MAX_UNANSWERED and announced.count("healthy") == 1
    engine.scheduler.partnered(healthy, 0)
    assert [i.sequence_key for i in engine.scheduler.plan(0.0).items] == [healthy.key]


def test_partners_are_asked_in_order_and_not_while_enough_is_ready_to_start():
    engine = Engine(num_blocks=18, max_sequences=1, cache=False)
    announced = []

    def asked():
        events = engine.scheduler.take_events()
        announced.extend(e.sequence for e in events if isinstance(e, Announced))
        return announced

    waiting = [hand_over(engine, f"r{i}", f"partner{i % 4}") for i in range(64)]
    num_asked = 4 * MAX_UNANSWERED
    assert asked() == waiting[:num_asked], "at once, also while a step runs"
    for sequence in waiting[:MAX_READY]:
        engine.scheduler.partnered(sequence, 0)
    num_asked += MAX_READY - 1
    assert asked() == waiting[:num_asked], "one more for each answer, until enough are ready"
    assert wait_reason_of(engine.scheduler, waiting[-1]) is WaitReason.TURN
    engine.scheduler.partnered(waiting[MAX_READY], 0)
    plan = engine.scheduler.plan(0.0)
    assert [i.sequence_key for i in plan.items] == [waiting[0].key]
    assert asked() == waiting[:num_asked], "sixteen and one were ready"
    engine.scheduler.cancel(waiting[1])
    assert wait_reason_of(engine.scheduler, waiting[num_asked]) is WaitReason.STEP
    engine.scheduler.plan(0.0)
    assert asked() == waiting[: num_asked + 2], "two have answered since"


def test_what_runs_ahead_of_its_partner_comes_last_and_is_computed_once():
    engine = Engine(num_blocks=40, budget=16, cache=False)
    ahead = hand_over(engine, "ahead", "slow", size=8)
    engine.step()
    assert ahead.status is Status.HOLDING and ahead.num_computed_tokens == 8
    second = hand_over(engine, "second", "slow", size=16)
    answered = hand_over(engine, "answered", "quick", size=12)
    engine.scheduler.waiting.announced(answered)
    engine.scheduler.partnered(answered, 0)
    assert lengths(engine.step()) == {answered.key: 12, second.key: 4}
    engine.scheduler.preempt(ahead)
    engine.step()
    assert ahead.status is Status.WAITING and second.status is Status.HOLDING
    assert wait_reason_of(engine.scheduler, ahead) is WaitReason.PARTNER
    engine.scheduler.partnered(ahead, 0)
    assert lengths(engine.step()) == {ahead.key: 8}


def test_partners_without_hand_overs_are_forgotten():
    engine = Engine(num_blocks=40, cache=False)
    for i in range(200):
        engine.scheduler.cancel(hand_over(engine, f"h{i}", f"partner{i}"))
    assert len(engine.scheduler.waiting) == 0
    assert engine.scheduler.waiting.num_partners == 0


def test_layers_are_reported_in_steps_that_compute_something_for_a_partner():
    engine = Engine(cache=False)
    first = hand_over(engine, "first", "partner", size=4)
    engine.submit(request("second", [2] * 8, **SMALL))
    engine.scheduler.partnered(first, 0)
    plan = engine.step()
    assert [item.sequence_key for item in plan.items][0] == first.key and len(plan.items) == 2
    assert plan.report_layers
    assert not engine.step().report_layers, "the first is held, the second decodes"
