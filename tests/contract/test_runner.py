"""The `RestartableRunner` port: what a step computes, what is told of it, and a death of ranks."""

import asyncio
import contextlib
import os
import random
import signal
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
from support import shared
from support.in_process_cluster import DirectRunner, load
from support.models import TINY

from core.config import EngineConfig
from core.errors import WorkerDied
from core.kv_layout import KVLayout
from core.plan import SampleSpec, StepItem, StepPlan
from core.types import SamplingParams
from engine.checkpoint.model_spec import read_model
from engine.ranks.rank_group import RankGroup
from simulation.hash_runner import MemoryKV
from simulation.loop import run_virtual
from simulation.runner import SimRunner

NUM_BLOCKS = 16
BLOCK_SIZE_TOKENS = 16
ENGINE = EngineConfig(num_blocks=NUM_BLOCKS, block_size_tokens=BLOCK_SIZE_TOKENS)
PROMPT = tuple(b"import os\n\nclass Contract:\n    def")
GREEDY = SamplingParams(temperature=0.0)
steps = count(1)


@dataclass
class Made:
    """A runner, and what a test does to it."""

    runner: Any
    num_layers: int
    run: Any
    """Runs a coroutine to its end."""
    die_in_step: Any = None
    die_between_steps: Any = None
    """None: it cannot die."""


@contextlib.contextmanager
def rank_process():
    with asyncio.Runner() as loop:
        spec = read_model(TINY)
        ranks = RankGroup(spec, ENGINE)
        loop.run(ranks.start())

        def pids():
            return set(ranks.rank_pids())

        def kill():
            os.kill(ranks.rank_pids()[0], signal.SIGKILL)

        shared.children.append(pids)
        yield Made(ranks, spec.num_layers, loop.run, kill, kill)
        loop.run(ranks.stop())
        shared.children.remove(pids)


@contextlib.contextmanager
def simulated():
    layout = KVLayout("m", "float32", 4, 2, 4, BLOCK_SIZE_TOKENS)
    kv = MemoryKV(layout, NUM_BLOCKS)
    runner = SimRunner(kv, layout, 256, random.Random(1), lambda plan: 0.01, lambda plan: None)

    def die_in_step():
        runner.dies_next = True

    yield Made(runner, layout.num_layers, run_virtual, die_in_step, runner.die_between_steps)


@contextlib.contextmanager
def in_process():
    spec, model = load(TINY, "float32")
    kv = MemoryKV(spec.layout(BLOCK_SIZE_TOKENS), NUM_BLOCKS)
    [memory] = kv.segments()
    yield Made(DirectRunner(model, memory, ENGINE), spec.num_layers, asyncio.run)


@pytest.fixture(scope="module", params=[rank_process, simulated, in_process])
def made(request):
    """One of each kind for all tests: to start a rank process takes seconds."""
    with request.param() as made:
        yield made


def sample(choice=0, position=0):
    return SampleSpec(choice, position, 1, GREEDY)


def step(made, *items, **more):
    """Execute a step; what of its layers was reported, and the result."""
    plan = StepPlan(next(steps), items, **more)
    layers = []
    result = made.run(made.runner.execute(plan, lambda *told: layers.append(told)))
    assert result.step_id == plan.step_id
    return [layer for step_id, layer in layers if step_id == plan.step_id], result


def whole_prompt(made, key=1, table=(3, 4, 5), released=()):
    """The token that follows the prompt."""
    item = StepItem(key, 0, PROMPT, table, (sample(),))
    _, result = step(made, item, released=(key, *released))
    return result.tokens[key, 0].token_id


def test_every_draw_is_answered_by_its_sequence_and_choice(made):
    items = (
        StepItem(1, 0, PROMPT, (3, 4, 5), (sample(0), sample(1))),
        StepItem(2, 0, PROMPT[:7], (6,), (sample(0),)),
        StepItem(3, 0, PROMPT[:9], (7,)),
    )
    _, result = step(made, *items, released=(1, 2, 3))
    assert set(result.tokens) == {(1, 0), (1, 1), (2, 0)}
    assert result.tokens[1, 0].token_id == result.tokens[1, 1].token_id, "both are greedy"
    assert result.failed == {} and result.scored == {}


def test_a_prompt_in_chunks_is_the_same_prompt(made):
    expected = whole_prompt(made)
    for end in (1, BLOCK_SIZE_TOKENS, BLOCK_SIZE_TOKENS + 1):
        _, first = step(made, StepItem(2, 0, PROMPT[:end], (8, 9, 10)), released=(2,))
        assert first.tokens == {}
        _, rest = step(made, StepItem(2, end, PROMPT[end:], (8, 9, 10), (sample(),)))
        assert rest.tokens[2, 0].token_id == expected


def test_blocks_are_copied_before_anything_is_computed(made):
    expected = whole_prompt(made, table=(3, 4, 5))
    last = len(PROMPT) - 1
    _, result = step(
        made,
        # It overwrites the block that is copied in the same step.
        StepItem(1, 0, PROMPT[::-1], (3, 4, 5)),
        StepItem(2, last, PROMPT[last:], (11, 12, 13), (sample(),)),
        copies=((3, 11), (4, 12), (5, 13)),
        released=(1, 2),
    )
    assert result.tokens[2, 0].token_id == expected


def test_a_released_sequence_may_stand_in_the_same_plan_with_a_new_table(made):
    expected = whole_prompt(made, key=1, table=(3, 4, 5))
    assert whole_prompt(made, key=1, table=(8, 9, 10)) == expected


@pytest.mark.parametrize("report_layers", [False, True])
def test_layers_are_reported_in_order_if_the_plan_asks_and_counted_always(made, report_layers):
    before = made.runner.layers_done
    item = StepItem(1, 0, PROMPT, (3, 4, 5), (sample(),))
    layers, _ = step(made, item, report_layers=report_layers, released=(1,))
    assert layers == (list(range(made.num_layers)) if report_layers else [])
    assert made.runner.layers_done - before == made.num_layers


def test_the_tokens_of_a_prompt_are_scored_with_their_rivals(made):
    targets = PROMPT[1:]
    item = StepItem(1, 0, PROMPT, (3, 4, 5), (sample(),), targets=targets, num_target_logprobs=3)
    _, result = step(made, item, released=(1,))
    assert list(result.scored) == [1]
    assert [score.token_id for score in result.scored[1]] == list(targets)
    assert all(len(score.top) == 3 and score.logprob < 0 for score in result.scored[1])


def test_a_group_that_dies_in_a_step_ends_it_and_works_again_after_a_restart(made):
    if made.die_in_step is None:
        pytest.skip("it cannot die")
    expected = whole_prompt(made)
    layers_done = made.runner.layers_done
    made.die_in_step()
    with pytest.raises(WorkerDied):
        step(made, StepItem(1, 0, PROMPT, (3, 4, 5), (sample(),)), released=(1,))
    made.run(made.runner.restart())
    assert made.runner.layers_done >= layers_done
    assert whole_prompt(made) == expected


def test_a_death_between_steps_is_told_once(made):
    if made.die_between_steps is None:
        pytest.skip("it cannot die")
    expected = whole_prompt(made)
    made.die_between_steps()

    async def told_within(seconds):
        async with asyncio.timeout(seconds):
            await made.runner.lost()

    made.run(told_within(5))
    made.run(made.runner.restart())
    with pytest.raises(TimeoutError):
        made.run(told_within(0.2))
    assert whole_prompt(made) == expected
