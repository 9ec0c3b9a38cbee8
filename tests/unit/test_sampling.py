"""Sampling: counter-based, alone in its row, and distributed as it should be."""

import numpy as np
import pytest

from core.plan import SampleSpec
from engine.sampling import draw, uniform

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.1], dtype=np.float32))


def spec(position=0, **changes):
    values = {"choice": 0, "seed": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_logprobs": None, "banned": ()}
    return SampleSpec(position=position, **{**values, **changes})


def shares(**changes):
    counts = np.zeros(4)
    for position in range(4000):
        counts[draw(LOGITS, spec(position, **changes)).token_id] += 1
    return counts / 4000


def test_the_number_depends_on_seed_choice_and_position_alone():
    assert uniform(1, 2, 3) == uniform(1, 2, 3)
    assert len({uniform(s, c, p) for s in range(5) for c in range(5) for p in range(5)}) == 125
    numbers = [uniform(9, 0, p) for p in range(5000)]
    assert 0 <= min(numbers) and max(numbers) < 1 and abs(np.mean(numbers) - 0.5) < 0.02


def test_shares_follow_the_distribution():
    assert np.abs(shares() - [0.5, 0.25, 0.15, 0.1]).max() < 0.03
    assert np.abs(shares(temperature=0.5) - np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345).max() < 0.03
    assert np.abs(shares(top_k=2) - [2 / 3, 1 / 3, 0, 0]).max() < 0.03
    assert np.abs(shares(top_p=0.7) - [2 / 3, 1 / 3, 0, 0]).max() < 0.03
    assert np.abs(shares(banned=(0,)) - [0, 0.5, 0.3, 0.2]).max() < 0.03


def test_greedy_ties_break_by_id_and_tiny_temperature_is_greedy():
    assert draw(np.array([1.0, 3.0, 3.0]), spec(temperature=0.0)).token_id == 1
    assert shares(temperature=1e-9)[0] == 1.0
    assert draw(LOGITS, spec(temperature=0.0, banned=(0,))).token_id == 1


def test_logprobs_are_of_the_model_not_of_the_filtered_draw():
    token = draw(LOGITS, spec(temperature=0.0, num_logprobs=2, banned=(0,)))
    assert token.token_id == 1 and token.logprob == pytest.approx(np.log(0.25), abs=1e-6)
    assert [i for i, _ in token.top] == [0, 1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_logits_raise(bad):
    with pytest.raises(ValueError, match="not finite"):
        draw(np.array([0.0, bad]), spec())
    with pytest.raises(ValueError, match="banned"):
        draw(LOGITS, spec(banned=(0, 1, 2, 3)))
