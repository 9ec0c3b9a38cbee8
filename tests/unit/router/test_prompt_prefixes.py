"""What the router knows of prefixes: names as workers make them, the view, prompts on their way."""

import asyncio
from dataclasses import replace

import pytest

from core.block_hash import block_hashes, hash_key, naming_of, root_hash
from core.prefix_changes import PrefixChange, StorageTier
from core.scopes import with_public
from core.session import Load, Role, WorkerDescriptor
from core.types import GenerateRequest, Path, SamplingParams
from prefix_index.view import PrefixView
from router.candidate import Candidate
from router.placement import PlacementConstraints, choose
from router.prompt_prefixes import SLICE_TOKENS, PromptPrefixes

KEY = hash_key("secret")
DESCRIPTOR = WorkerDescriptor("p", Role.PREFILL, 1, "a", "b", "m", "digest", 16, 10_000, 65_536)
REQUEST = GenerateRequest("r", "m", tuple(range(161)), SamplingParams(), 1, 0.0, scope="acme")


class Clock:
    now = 0.0

    def now_s(self):
        return self.now


def as_worker_names(request, size=16, scope=None):
    root = root_hash("digest", request.scope if scope is None else scope, KEY)
    return block_hashes(root, request.token_ids, size)


def prefixes_with(worker, stored):
    view = PrefixView()
    view.apply(worker, 1, PrefixChange(stored))
    return PromptPrefixes(view, KEY, Clock())


@pytest.mark.parametrize("length", [161, SLICE_TOKENS + 1, 3 * SLICE_TOKENS + 161])
async def test_a_prompt_has_the_names_that_its_worker_gave_its_blocks(length):
    request = replace(REQUEST, token_ids=tuple(range(length)))
    prefixes = prefixes_with("p", as_worker_names(request)[:7])
    assert prefixes.held(await prefixes.names(request, [DESCRIPTOR])) == {"p": 7}


@pytest.mark.parametrize("num_public", [100, SLICE_TOKENS, SLICE_TOKENS + 96])
async def test_a_public_beginning_is_found_whoever_computed_it(num_public):
    tokens = tuple(range(2 * SLICE_TOKENS))
    theirs = []
    naming = naming_of("digest", with_public("other\n", num_public), 16, KEY)
    naming.extend(theirs, tokens, 16)
    prefixes = prefixes_with("p", theirs)
    mine = replace(REQUEST, token_ids=tokens, scope=with_public("acme\n", num_public))
    assert prefixes.held(await prefixes.names(mine, [DESCRIPTOR])) == {"p": num_public // 16}


async def test_what_lies_on_a_holders_disk_alone_is_held_and_is_no_source():
    """A peer reads pools: it would decline, and the prompt would have waited for nothing."""
    hashes = as_worker_names(REQUEST)
    view = PrefixView()
    view.apply("p", 1, PrefixChange(hashes[:3]))
    view.apply("q", 1, PrefixChange(hashes[:2]))
    prefixes = PromptPrefixes(view, KEY, Clock())
    names = await prefixes.names(REQUEST, [DESCRIPTOR])
    assert prefixes.in_pools(names, prefixes.published(names)) == {"p": 3, "q": 2}
    view.apply("p", 1, PrefixChange(hashes[:7], tier=StorageTier.DISK))
    view.apply("p", 1, PrefixChange(evicted=hashes[1:3]))
    published = prefixes.published(names)
    assert published == {"p": 7, "q": 2}
    assert prefixes.in_pools(names, published) == {"p": 1, "q": 2}


async def test_others_have_their_turn_while_a_long_prompt_is_hashed():
    request = replace(REQUEST, token_ids=tuple(range(5 * SLICE_TOKENS)))
    prefixes = prefixes_with("p", as_worker_names(request))
    hashing = asyncio.create_task(prefixes.names(request, [DESCRIPTOR]))
    turns = 0
    while not hashing.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 5
    names = as_worker_names(replace(request, token_ids=request.token_ids[:-1]))
    assert hashing.result() == {("digest", 16): names}


async def test_another_tenant_key_or_model_finds_nothing():
    prefixes = prefixes_with("p", as_worker_names(REQUEST))
    assert prefixes.held(await prefixes.names(REQUEST, [DESCRIPTOR])) == {"p": 10}
    stranger = replace(REQUEST, scope="other")
    assert prefixes.held(await prefixes.names(stranger, [DESCRIPTOR])) == {}
    other_model = replace(DESCRIPTOR, content_digest="another")
    assert prefixes.held(await prefixes.names(REQUEST, [other_model])) == {}


async def test_each_block_size_has_its_own_names():
    view = PrefixView()
    view.apply("p", 1, PrefixChange(as_worker_names(REQUEST)[:3]))
    view.apply("d", 1, PrefixChange(as_worker_names(REQUEST, size=64)[:2]))
    prefixes = PromptPrefixes(view, KEY, Clock())
    both = [DESCRIPTOR, replace(DESCRIPTOR, worker_id="d", block_size_tokens=64)]
    assert prefixes.held(await prefixes.names(REQUEST, both)) == {"p": 3, "d": 2}


async def test_without_a_view_or_with_an_empty_one_nothing_is_hashed_and_nothing_changes():
    for view in (None, PrefixView()):
        prefixes = PromptPrefixes(view, KEY, Clock())
        names = await prefixes.names(REQUEST, [DESCRIPTOR])
        prefixes.sent("run", DESCRIPTOR, names)
        assert names == {} and prefixes.held(names) == {}


async def test_a_burst_of_one_new_prefix_stays_together_before_its_worker_tells():
    prefixes = prefixes_with("other", as_worker_names(replace(REQUEST, token_ids=(7,) * 50)))
    names = await prefixes.names(REQUEST, [DESCRIPTOR])
    prefixes.sent("run", DESCRIPTOR, names)
    assert prefixes.held(names) == {"p": 10}
    prefixes.failed("run")
    assert prefixes.held(names) == {}


async def test_a_longer_turn_goes_to_the_holder_of_the_turn_before():
    longer = replace(REQUEST, token_ids=tuple(range(200)))
    prefixes = prefixes_with("p2", as_worker_names(REQUEST))
    held = prefixes.held(await prefixes.names(longer, [DESCRIPTOR]))
    idle = Load(free_blocks=1_000)
    pool = [
        Candidate(replace(DESCRIPTOR, worker_id="p1"), idle),
        Candidate(replace(DESCRIPTOR, worker_id="p2"), idle),
        Candidate(replace(DESCRIPTOR, worker_id="d", role=Role.DECODE), idle),
    ]
    placement = choose(pool, longer, PlacementConstraints(), held, now_s=0.0)
    assert (placement.path, placement.prefill.worker_id) == (Path.PD, "p2")
    assert placement.uncached_tokens == 40
