"""What is exactly at a limit of an engine is taken, what is one above it is not."""

import pytest
from support.stepping import Engine, request

from core.errors import PromptTooLong
from engine.scheduling.sequence import Handover, Status

# --- an engine's ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_tokens", "fits"), [(30, True), (31, False)])
def test_a_request_fills_the_context_window_to_the_last_token(max_tokens, fits):
    engine = Engine(num_blocks=100, block=4, max_len=40)
    wanted = request("r", [1] * 10, max_tokens=max_tokens)
    if fits:
        engine.submit(wanted)
        return
    with pytest.raises(PromptTooLong, match=r"is 41, the context window is 40"):
        engine.submit(wanted)


@pytest.mark.parametrize(("n", "fits"), [(2, True), (3, False)])
def test_a_request_fills_the_pool_to_the_last_block(n, fits):
    """One block more for each choice: while they share a prompt each of them grows."""
    engine = Engine(num_blocks=12, block=4)
    wanted = request("r", [1] * 10, max_tokens=30, n=n)
    if fits:
        engine.submit(wanted)
        engine.run()
        return
    with pytest.raises(PromptTooLong, match=r"needs 13 blocks, the pool holds 12"):
        engine.submit(wanted)


@pytest.mark.parametrize(("num_held", "runs"), [(0, True), (1, False)])
def test_a_hand_over_runs_ahead_while_it_leaves_half_of_the_pool(num_held, runs):
    engine = Engine(num_blocks=20, block=4, budget=40, cache=False)
    engine.pool.allocate(num_held)
    ahead = engine.scheduler.new_sequence(
        request("r", [1] * 40), 1, (0,), (), 0.0, handover=Handover("slow")
    )
    engine.scheduler.submit(ahead)
    engine.scheduler.plan(0.0)
    assert ahead.status is (Status.RUNNING if runs else Status.WAITING)
