"""Sampling: counter-based, alone in its row, and distributed as it should be."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from core.plan import History, SampleSpec
from core.types import SamplingParams
from engine.model.sampling import draw, score, uniform

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.1], dtype=np.float32))


def spec(position=0, banned=(), history=None, **params):
    return SampleSpec(0, position, 1, SamplingParams(**params), banned, history)


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
    assert (
        np.abs(shares(temperature=0.5) - np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345).max()
        < 0.03
    )
    assert np.abs(shares(top_k=2) - [2 / 3, 1 / 3, 0, 0]).max() < 0.03
    assert np.abs(shares(top_p=0.7) - [2 / 3, 1 / 3, 0, 0]).max() < 0.03
    assert np.abs(shares(banned=(0,)) - [0, 0.5, 0.3, 0.2]).max() < 0.03


def test_greedy_ties_break_by_id_and_tiny_temperature_is_greedy():
    assert draw(np.array([1.0, 3.0, 3.0]), spec(temperature=0.0)).token_id == 1
    assert shares(temperature=1e-9)[0] == 1.0
    assert draw(LOGITS, spec(temperature=0.0, banned=(0,))).token_id == 1


def test_logprobs_are_of_the_model_not_of_the_filtered_draw():
    token = draw(LOGITS, spec(temperature=0.0, logprobs=2, banned=(0,)))
    assert token.token_id == 1 and token.logprob == pytest.approx(np.log(0.25), abs=1e-6)
    assert [i for i, _ in token.top] == [0, 1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_logits_raise(bad):
    with pytest.raises(ValueError, match="not finite"):
        draw(np.array([0.0, bad]), spec())
    with pytest.raises(ValueError, match="banned"):
        draw(LOGITS, spec(banned=(0, 1, 2, 3)))


# --- against transformers' own processors, which share no code with ours --------------------------


def history(prompt, output, start=0):
    tokens = [*prompt, *output]
    return History(tokens, start, len(prompt), len(tokens))


def greedy_order(logits, wish):
    """Every token in the order our draw would choose them,
    by banning the winner again and again."""
    found = []
    while len(found) < 20:
        found.append(draw(logits, replace(wish, banned=wish.banned + tuple(found))).token_id)
    return found


def test_repetition_penalty_is_that_of_transformers():
    logits = np.random.default_rng(1).normal(size=50).astype(np.float32) * 4
    prompt, output = [3, 7, 7, 20], [11, 3, 49]
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(
        torch.tensor([prompt + output]), torch.tensor(logits)[None].clone()
    )[0]
    wish = spec(temperature=0.0, repetition_penalty=1.7, history=history(prompt, output))
    assert greedy_order(logits, wish) == torch.argsort(-theirs, stable=True)[:20].tolist()


def test_presence_counts_once_and_frequency_every_time_and_neither_sees_the_prompt():
    logits = np.zeros(6, dtype=np.float32)
    logits[:4] = [1.0, 1.1, 1.2, 1.3]
    wish = spec(
        temperature=0.0,
        presence_penalty=0.05,
        frequency_penalty=0.1,
        history=history([3, 3], [2, 1, 1], start=2),
    )
    # 3 stays 1.3; 2: 1.2 - 0.15; 1: 1.1 - 0.25; 0 stays 1.0
    order, banned = [], (4, 5)
    for _ in range(4):
        order.append(draw(logits, replace(wish, banned=banned)).token_id)
        banned += (order[-1],)
    assert order == [3, 2, 0, 1]


def test_min_p_keeps_what_transformers_keeps():
    logits = np.random.default_rng(2).normal(size=40).astype(np.float32) * 2
    for min_p, temperature in ((0.05, 1.0), (0.3, 0.7), (1.0, 1.3)):
        theirs = MinPLogitsWarper(min_p)(None, torch.tensor(logits)[None] / temperature)[0]
        kept = set(torch.isfinite(theirs).nonzero()[:, 0].tolist())
        drawn = {
            draw(logits, spec(temperature=temperature, min_p=min_p, position=i)).token_id
            for i in range(4000)
        }
        assert drawn <= kept and len(drawn) >= 0.7 * len(kept)


def test_bias_allowed_and_banned_tokens():
    logits = np.arange(10, dtype=np.float32)
    assert draw(logits, spec(temperature=0.0, logit_bias=((2, 100.0),))).token_id == 2
    assert draw(logits, spec(temperature=0.0, logit_bias=((9, -100.0),))).token_id == 8
    among = {"temperature": 0.0, "allowed_token_ids": (1, 4, 3)}
    assert draw(logits, spec(**among)).token_id == 4
    assert draw(logits, spec(**among, banned=(4,))).token_id == 3
    with pytest.raises(ValueError, match="banned"):
        draw(logits, spec(temperature=0.0, allowed_token_ids=(1,), banned=(1,)))


def test_log_probabilities_are_the_models_own_whatever_was_adjusted():
    logits = np.random.default_rng(3).normal(size=30).astype(np.float32)
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1)
    drawn = draw(logits, spec(temperature=0.0, logprobs=3, logit_bias=((5, 50.0),)))
    assert drawn.token_id == 5 and abs(drawn.logprob - float(expected[5])) < 1e-12
    assert [i for i, _ in drawn.top] == torch.argsort(-expected)[:3].tolist()
    assert abs(score(logits, 7, 2).logprob - float(expected[7])) < 1e-12
