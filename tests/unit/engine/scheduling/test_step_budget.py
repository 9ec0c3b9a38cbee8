"""How many tokens a step computes: what a long and a short step make of it, and its floor."""

import pytest

from engine.scheduling.block_tables import Limits
from engine.scheduling.step_budget import MIN_STEP_TOKENS, StepBudget


def test_a_step_is_long_above_half_a_second_and_short_below_a_fifth():
    found = []
    for start, took_s in [(100, 0.5), (100, 0.6), (50, 0.2), (50, 0.19), (70, 0.19)]:
        budget = StepBudget(Limits(4, 100, 2, 400))
        budget.num_tokens = start
        budget.fit(start, took_s)
        found.append(budget.num_tokens)
    assert found == [100, 66, 50, 100, 100]


@pytest.mark.parametrize(
    ("num_tokens", "took_s", "left"), [(45, 1.0, 18), (46, 1.0, 18), (50, 1.0, 20)]
)
def test_a_budget_never_shrinks_below_one_token_for_each_place_and_some_for_a_prompt(
    num_tokens, took_s, left
):
    budget = StepBudget(Limits(4, 100, 2, 400))
    budget.fit(num_tokens, took_s)
    assert budget.num_tokens == left
    small = StepBudget(Limits(4, 10, 2, 400))
    small.fit(10, 60.0)
    assert small.num_tokens == 10, "and never above what is configured"


def test_the_time_of_a_token_follows_full_steps_by_a_quarter_and_small_ones_not_at_all():
    budget = StepBudget(Limits(4, 100, 2, 400))
    found = []
    for num_tokens, took_s in [(MIN_STEP_TOKENS, 0.16), (50, 1.0), (MIN_STEP_TOKENS - 1, 9.0)]:
        budget.fit(num_tokens, took_s)
        found.append(budget.token_s)
    assert found == pytest.approx([0.01, 0.0125, 0.0125])
