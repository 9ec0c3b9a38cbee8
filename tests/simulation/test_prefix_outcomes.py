"""A router compares what it expected in a worker's cache with what the worker found there."""

import asyncio
from collections import Counter

import pytest
from support.prefixes import look_at
from support.virtual import PD, PROMPT, ask, run, unit

from core.block_hash import BlockHash, block_hashes, root_hash
from core.prefix_changes import PrefixChange
from core.session import Role
from core.types import SamplingParams
from prefix_index.view import PrefixView
from router.prefix_outcome import TokenOutcome
from simulation.observers import ClusterObserver
from simulation.shape import HASH_KEY

SIZE = 4
WHOLE = 56


class Outcomes(ClusterObserver):
    """What became of each prompt that was computed."""

    def __init__(self, cluster):
        self.found = []
        cluster.observers.join(self)

    def prompt_computed(self, run, outcome):
        self.found.append((Counter(outcome.tokens), outcome.cause))


def with_view(cluster):
    """Give the router a view, as the index would; returns it, and who hears of outcomes."""
    view = PrefixView()
    look_at(cluster.routers[0].attempts, view)
    return view, Outcomes(cluster)


def publish(view, worker, num_blocks):
    """Tell the view what a worker's index would."""
    d = worker.descriptor
    names = block_hashes(root_hash(d.content_digest, "", HASH_KEY), PROMPT, SIZE)[:num_blocks]
    view.apply(d.worker_id, d.incarnation, PrefixChange(names))
    return names


def test_what_the_view_has_is_found_and_counted_once_a_request():
    async def scenario(cluster):
        view, outcomes = with_view(cluster)
        await ask(cluster, "first")
        publish(view, unit(cluster, Role.PREFILL), 14)
        await ask(cluster, "second")
        return outcomes.found

    # Without any entry nothing is hashed, and nobody can tell of the first.
    hits = Counter({TokenOutcome.HIT: WHOLE, TokenOutcome.NOT_CACHED: 3})
    assert run(scenario) == [(hits, None)]


@pytest.mark.parametrize("is_told", [False, True])
def test_an_eviction_that_the_router_has_not_heard_of_is_a_stale_placement(is_told):
    async def scenario(cluster):
        view, outcomes = with_view(cluster)
        await ask(cluster, "first")
        prefill = unit(cluster, Role.PREFILL)
        names = publish(view, prefill, 14)
        prefill.pool.drop_cache()
        submit = prefill.attempts.submit

        def submitting(*args, **more):
            """The news comes, or does not, while the prompt is on its way."""
            if is_told:
                d = prefill.descriptor
                view.apply(d.worker_id, d.incarnation, PrefixChange((), names))
            return submit(*args, **more)

        prefill.attempts.submit = submitting
        await ask(cluster, "second")
        return outcomes.found

    cause = TokenOutcome.EVICTED if is_told else TokenOutcome.STALE
    assert run(scenario) == [(Counter({cause: WHOLE, TokenOutcome.NOT_CACHED: 3}), cause)]


def test_what_another_prompt_was_to_bring_and_did_not_is_unfinished():
    async def scenario(cluster):
        view, outcomes = with_view(cluster)
        descriptor = unit(cluster, Role.PREFILL).descriptor
        elsewhere = PrefixChange([BlockHash(b"another prompt's")])
        view.apply(descriptor.worker_id, descriptor.incarnation, elsewhere)
        prefixes = cluster.routers[0].attempts._prefixes
        request = cluster.request("before", PROMPT, SamplingParams())
        names = await prefixes.names(request, [descriptor])
        prefixes.sent("before", descriptor, names)
        await ask(cluster, "second")
        return outcomes.found

    cause = TokenOutcome.UNFINISHED
    assert run(scenario) == [(Counter({cause: WHOLE, TokenOutcome.NOT_CACHED: 3}), cause)]


def test_a_prompt_whose_scores_are_wanted_is_computed_whole_and_expected_of_nobody():
    async def scenario(cluster):
        view, outcomes = with_view(cluster)
        await ask(cluster, "first")
        publish(view, unit(cluster, Role.PREFILL), 14)
        await ask(cluster, "second", prompt_logprobs=0)
        return outcomes.found

    assert run(scenario) == []


def test_what_a_request_computed_itself_before_a_death_is_no_hit():
    async def scenario(cluster):
        view, outcomes = with_view(cluster)
        for worker in cluster.units.values():
            publish(view, worker, 1)
        running = asyncio.get_running_loop().create_task(
            ask(cluster, max_tokens=30, ignore_eos=True)
        )
        await asyncio.sleep(0.2)
        victim = next(
            node
            for node, u in cluster.units.items()
            if u.descriptor.role is Role.DECODE and u.attempts.by_run
        )
        await cluster.kill(victim)
        _, ended = await running
        return len(ended.timing.attempts), len(outcomes.found)

    assert run(scenario, decode=2, placement=PD) == (2, 1)
