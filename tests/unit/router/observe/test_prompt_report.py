"""Who holds how much of a prompt, and where it would go now."""

from dataclasses import replace

import pytest

from core.block_hash import block_hashes, hash_key, root_hash
from core.clocks import LoopClock
from core.config import PlacementConfig
from core.prefix_changes import PrefixChange, StorageTier
from core.session import Load, Role, WorkerDescriptor
from core.types import GenerateRequest, SamplingParams
from prefix_index.view import PrefixView
from router.candidate import Candidate
from router.observe import prompt_report
from router.observe.prompt_report import PromptReport
from router.peer_fetches import PeerFetches
from router.placer import Placer
from router.pool_choice import PoolChoice
from router.prompt_prefixes import PromptPrefixes

KEY = hash_key("secret")
SIZE = 16
REQUEST = GenerateRequest(
    "r", "m", tuple(range(161)), SamplingParams(max_tokens=9), 1, 0.0, scope="acme", tenant="acme"
)
NAMES = block_hashes(root_hash("digest", "acme", KEY), REQUEST.token_ids[:-1], SIZE)


def worker(name, role=Role.PREFILL):
    descriptor = WorkerDescriptor(name, role, 1, "a", "b", "m", "digest", SIZE, 10_000, 65_536)
    return Candidate(descriptor, Load(free_blocks=10_000))


P1, P2, D = worker("p1"), worker("p2"), worker("d", Role.DECODE)


class House:
    """A view, the prompts on their way, and the report on both."""

    def __init__(self, *pool):
        self.view = PrefixView()
        self.prefixes = PromptPrefixes(self.view, KEY, LoopClock())
        fetches = PeerFetches(None, None, LoopClock())
        placer = Placer(lambda: pool, PoolChoice({}), self.prefixes, fetches, LoopClock())
        self.report = PromptReport(self.prefixes, placer, lambda: pool, PlacementConfig())

    def stores(self, name, *blocks, tier=StorageTier.POOL):
        self.view.apply(name, 1, PrefixChange(blocks, tier=tier))


async def test_holders_are_shown_by_tier_with_what_is_on_its_way_and_the_choice():
    house = House(P1, P2, D)
    house.stores("p1", *NAMES[:4])
    house.stores("p1", *NAMES[3:6], tier=StorageTier.DISK)
    house.stores("gone", *NAMES)
    names = await house.prefixes.names(REQUEST, [P1.descriptor])
    house.prefixes.sent("another", P2.descriptor, names)
    found = await house.report.of(REQUEST)
    assert (found["prompt_tokens"], found["tenant"]) == (161, "acme")
    assert [(b["block_size_tokens"], b["num_blocks"]) for b in found["blocks"]] == [(SIZE, 10)]
    assert found["blocks"][0]["names"] == [name.hex() for name in NAMES]
    assert found["workers"] == [
        {
            "worker": "p2",
            "role": "prefill",
            "leading_blocks": 0,
            "leading_tokens": 0,
            "storage": {},
            "expected_blocks": 10,
        },
        {
            "worker": "p1",
            "role": "prefill",
            "leading_blocks": 6,
            "leading_tokens": 96,
            "storage": {"pool": 4, "disk": 2},
            "expected_blocks": 0,
        },
    ]
    assert found["decision"]["prefill_worker"] == "p2"
    cached = {c["worker"]: (c["path"], c["cached_tokens"]) for c in found["candidates"]}
    assert cached == {"p1": ("pd", 96), "p2": ("pd", 160), "d": ("local", 0)}


async def test_another_scope_sees_nothing_of_it():
    house = House(P1, D)
    house.stores("p1", *NAMES)
    found = await house.report.of(replace(REQUEST, scope="bulk", tenant="bulk"))
    assert found["workers"] == [] and found["blocks"][0]["num_blocks"] == 10
    assert not {name.hex() for name in NAMES} & set(found["blocks"][0]["names"])


async def test_an_empty_view_still_names_the_blocks_and_no_workers_are_an_answer():
    found = await House(P1, D).report.of(REQUEST)
    assert found["blocks"][0]["num_blocks"] == 10 and found["workers"] == []
    assert found["decision"]["path"] == "pd"
    nobody = await House().report.of(REQUEST)
    assert nobody["blocks"] == [] and "0 prefill and 0 decode workers" in nobody["error"]


@pytest.mark.parametrize(("max_tokens", "path"), [(1, "local"), (2, "pd")])
async def test_a_single_token_is_not_handed_over(max_tokens, path):
    request = replace(REQUEST, sampling=SamplingParams(max_tokens=max_tokens))
    found = await House(P1, D).report.of(request)
    assert found["decision"]["path"] == path


async def test_what_is_shown_of_many_workers_and_blocks_is_bounded(monkeypatch):
    monkeypatch.setattr(prompt_report, "MAX_WORKERS", 2)
    monkeypatch.setattr(prompt_report, "MAX_NAMES", 3)
    house = House(*(worker(f"p{i}") for i in range(5)), D)
    for i in range(5):
        house.stores(f"p{i}", *NAMES[: i + 1])
    found = await house.report.of(REQUEST)
    assert [row["worker"] for row in found["workers"]] == ["p4", "p3"]
    assert len(found["blocks"][0]["names"]) == 3


@pytest.mark.parametrize(("num_scores", "source"), [(None, "p1"), (0, None)])
async def test_a_prompt_whose_scores_are_wanted_is_shown_as_computed_whole(num_scores, source):
    busy = replace(P1, pending_tokens=100_000)
    idle = replace(P2, descriptor=replace(P2.descriptor, incarnation=2), prefill_tokens_per_s=100.0)
    house = House(busy, idle, D)
    house.stores("p1", *NAMES)
    sampling = SamplingParams(max_tokens=9, prompt_logprobs=num_scores)
    found = await house.report.of(replace(REQUEST, sampling=sampling))
    assert found["decision"]["prefill_worker"] == "p2"
    assert found["decision"].get("source") == source
