"""What one seed decides before it runs: a cluster with odd but legal settings, a load, its faults.

Owns the drawing of each style of trials. Does not know how a plan is carried out.

    CALM   a load well below capacity            POOL    above capacity, with few blocks
    ALONE  one worker a role, slow to start      GIANTS  giant prompts beside small ones
    ADMISSION  few permits, short waits for them
"""

from __future__ import annotations

import random
from dataclasses import replace

from core.config import (
    EngineConfig,
    OwnPoolsConfig,
    PlacementConfig,
    PoolConfig,
    RouterConfig,
    TierConfig,
    TransferConfig,
)
from core.scopes import scope_of
from core.types import SamplingParams
from simulation.faults.kinds import Fault, Kind, Part, draw
from simulation.plan import TIMEOUT_S, PlannedRequest, Style, TrialPlan
from simulation.quota_loads import with_quotas
from simulation.shape import VOCABULARY, ClusterShape

NUM_REQUESTS = 24
NUM_FAULTS = 20
PART_SHARES = {Part.SERVING: 1.0, Part.PREFIX_INDEX: 0.25, Part.QUOTAS: 0.25}
"""Faults of each part of the cluster, for each one of serving. Drawn apart, so that a new part does
not thin out the faults of the others."""
LOAD_S = 4.0
MODEL_LEN = 130
GIANT_MODEL_LEN = 700
STYLES = 6 * [Style.CALM] + [Style.ALONE, Style.ADMISSION, Style.POOL, Style.GIANTS]
SCOPES = (scope_of("b", ""), scope_of("c", ""))
"""Of two tenants, whose requests take turns in workers; others are nobody's."""
SLOW_STEP_S = 0.25
"""At this pace one worker alone, where faults leave no other, serves a whole load in time."""


def make_plan(
    seed: int,
    num_faults: int = NUM_FAULTS,
    num_requests: int | None = None,
    style: Style | None = None,
) -> TrialPlan:
    """Draw a plan; a style that is given is taken instead of the drawn one."""
    rng = random.Random(seed)
    drawn = rng.choice(STYLES)  # also if a style is given: the draws after it stay the same
    style = style or drawn
    shape = _STYLED[style](rng, _calm(rng))
    # The order of draws is part of what a seed means: shape, faults, requests.
    faults = _draw_faults(rng, num_faults, style, shape)
    drawing = _Drawing(rng, style, shape, num_requests)
    requests = _with_faults(rng, drawing.requests(), faults)
    # With randomness of their own: tiers and quotas leave the rest of a plan as it is.
    plan = _with_tiers(
        random.Random(f"tiers {seed}"), TrialPlan(seed, shape, requests, faults, style)
    )
    plan = _with_own_pools(random.Random(f"pools {seed}"), plan)
    num_of_quotas = round(PART_SHARES[Part.QUOTAS] * num_faults)
    return with_quotas(random.Random(f"quotas {seed}"), plan, num_of_quotas, LOAD_S)


def _draw_faults(
    rng: random.Random, num_faults: int, style: Style, shape: ClusterShape
) -> tuple[Fault, ...]:
    # On a forced path no placement avoids a worker of another model.
    without = [Kind.INCOMPATIBLE] if shape.placement.path == "pd" else []
    often = 8 * [Kind.RANK_DEATH] if style is Style.ALONE else []
    faults = draw(rng, num_faults, LOAD_S, without, often)
    if style in (Style.GIANTS, Style.POOL) and shape.decode > 1 and faults:
        # One decode worker among healthy ones stands still from the first burst on.
        still = Fault(Kind.PAUSE, 0.25, 0.0, rng.uniform(2.0, 2.9))
        faults = (still, *(f for f in faults[1:] if f.kind is not Kind.PAUSE))
    for part, share in PART_SHARES.items():
        if part is not Part.SERVING and _is_used(part, shape):
            faults += draw(rng, round(share * num_faults), LOAD_S, part=part)
    return tuple(sorted(faults, key=lambda fault: fault.at_s))


def _is_used(part: Part, shape: ClusterShape) -> bool:
    """Can a part fail at all in such a cluster?"""
    match part:
        case Part.PREFIX_INDEX:
            return shape.engine.cache_prefixes
        case Part.QUOTAS:
            return False  # not yet: only with limits, which are drawn last
        case Part.SERVING:
            return True


# --- clusters -------------------------------------------------------------------------------------


def _calm(rng: random.Random) -> ClusterShape:
    block_size = rng.choice([2, 4, 8])
    engine = EngineConfig(
        block_size_tokens=block_size,
        num_blocks=rng.choice([44, 64, 128]) * 4 // block_size,
        max_step_tokens=rng.choice([8, 16, 32, 128]),
        max_sequences=rng.choice([4, 8, 16]),
        cache_prefixes=rng.random() < 0.8,
    )
    return ClusterShape(
        prefill=rng.randint(1, 3),
        decode=rng.randint(2, 3),
        routers=2,
        engine=engine,
        router=RouterConfig(credit_positions=rng.choice([4, 16, 256]), replicas=2),
        placement=PlacementConfig(path="auto", local_below_tokens=rng.choice([1, 12, 40])),
        transfer=TransferConfig(
            frame_bytes=4096, lease_s=rng.choice([1.0, 5.0]), reserve_wait_s=rng.choice([0.5, 10.0])
        ),
        step_s=rng.choice([0.0005, 0.004, 0.02]),
        latency_s=rng.choice([(1e-6, 2e-5), (0.0001, 0.002), (0.001, 0.03)]),
        max_model_len=MODEL_LEN,
        max_message_bytes=rng.choice([10, 16, 64]) << 10,
        spawn_s=rng.choice([0.0, 0.05, 0.6]),
        load_s=rng.choice([0.1, 0.5, 2.0]),
    )


def _alone(rng: random.Random, shape: ClusterShape) -> ClusterShape:
    """One worker a role: no event of another one wakes those who wait for it."""
    path = rng.choice(["auto", "pd", "pd", "local"])
    placement = shape.placement.model_copy(update={"path": path})
    load_s = rng.choice([0.5, 2.0, 4.5])
    return replace(
        shape,
        prefill=1,
        decode=1,
        placement=placement,
        latency_s=rng.choice([(0.0001, 0.002), (0.01, 0.1)]),
        spawn_s=rng.choice([0.05, 0.6]),
        load_s=load_s,
    )


def _admission(rng: random.Random, shape: ClusterShape) -> ClusterShape:
    router = shape.router.model_copy(
        update={
            "max_running": rng.choice([2, 4]),
            "max_queued": rng.choice([8, 32]),
            "queue_wait_s": rng.choice([0.1, 0.3, 1.0]),
        }
    )
    return replace(shape, router=router, step_s=max(shape.step_s, 0.004))


def _pool(rng: random.Random, shape: ClusterShape) -> ClusterShape:
    """One or two decode workers whose blocks are few."""
    engine = shape.engine.model_copy(
        update={
            "block_size_tokens": 4,
            "num_blocks": rng.choice([38, 44, 60]),
            "max_sequences": rng.choice([8, 16]),
            "max_step_tokens": 32,
        }
    )
    placement = PlacementConfig(path=rng.choice(["auto", "pd"]), local_below_tokens=1)
    transfer = shape.transfer.model_copy(update={"reserve_wait_s": 10.0, "lease_s": 5.0})
    return replace(
        shape,
        prefill=rng.choice([1, 2]),
        decode=rng.choice([1, 1, 2]),
        engine=engine,
        placement=placement,
        transfer=transfer,
        step_s=rng.choice([0.004, 0.01]),
        latency_s=(0.0001, 0.002),
    )


def _giants(rng: random.Random, shape: ClusterShape) -> ClusterShape:
    """Prompts of many steps, and a decode worker slower than the others."""
    block_size = shape.engine.block_size_tokens
    engine = shape.engine.model_copy(
        update={
            "num_blocks": GIANT_MODEL_LEN * rng.choice([2, 3]) // (2 * block_size) + 16,
            "max_step_tokens": rng.choice([16, 32]),
        }
    )
    shape = replace(
        shape,
        prefill=rng.choice([1, 1, 2]),
        decode=2,
        engine=engine,
        placement=PlacementConfig(path="auto", local_below_tokens=rng.choice([1, 1, 12])),
        max_model_len=GIANT_MODEL_LEN,
        step_s=rng.choice([0.004, 0.02]),
    )
    whole_step_s = shape.step_s + shape.token_s * engine.max_step_tokens
    return replace(shape, slow=rng.choice([1.0, SLOW_STEP_S / whole_step_s]))


_STYLED = {
    Style.CALM: lambda rng, shape: shape,
    Style.ALONE: _alone,
    Style.ADMISSION: _admission,
    Style.POOL: _pool,
    Style.GIANTS: _giants,
}


# --- requests -------------------------------------------------------------------------------------


class _Drawing:
    """The requests of one plan."""

    def __init__(
        self, rng: random.Random, style: Style, shape: ClusterShape, num_requests: int | None
    ) -> None:
        self._rng = rng
        self._style = style
        self._shape = shape
        self._num_requests = num_requests
        self._beginnings = [self._tokens(40) for _ in range(2)]
        self._giant_beginning = self._tokens(240) if style is Style.GIANTS else ()

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._rng.randrange(1, VOCABULARY) for _ in range(count))

    def _beginning(self, most_tokens: int) -> tuple[int, ...]:
        """Begin as many prompts do, so that caches hit."""
        return self._rng.choice(self._beginnings)[: self._rng.choice([8, 16, 24, 40])][:most_tokens]

    def requests(self) -> list[PlannedRequest]:
        """Draw them all."""
        draw_one = {Style.POOL: self._small_or_long, Style.GIANTS: self._small_or_giant}
        counts = {Style.POOL: 90, Style.GIANTS: 48, Style.ADMISSION: 48}
        count = counts.get(self._style, NUM_REQUESTS)
        return [
            draw_one.get(self._style, self._mixed)(i) for i in range(self._num_requests or count)
        ]

    def _mixed(self, i: int) -> PlannedRequest:
        rng = self._rng
        prompt = self._tokens(rng.randrange(1, 60))
        if i % 3:
            prompt = self._beginning(40) + prompt[:40]
        is_scored = rng.random() < 0.12
        sampling = SamplingParams(
            max_tokens=rng.randrange(1, 40),
            n=rng.choice([1, 1, 1, 2, 3]),
            temperature=rng.choice([0.0, 1.0]),
            ignore_eos=rng.random() < 0.5,
            stop=(chr(32 + rng.randrange(VOCABULARY)) + chr(32 + rng.randrange(VOCABULARY)),)
            * (rng.random() < 0.2),
            prompt_logprobs=rng.choice([0, 5, 20]) if is_scored else None,
        )
        timeout_s = TIMEOUT_S
        if self._style is Style.ADMISSION and rng.random() < 0.2:
            timeout_s = rng.uniform(0.2, 3.0)
        return PlannedRequest(
            start_s=self._burst_s() if self._style is Style.ADMISSION else rng.uniform(0, LOAD_S),
            name=f"r{i}",
            prompt=prompt,
            sampling=sampling,
            scope=rng.choice(["", *SCOPES]),
            timeout_s=timeout_s,
        )

    def _burst_s(self) -> float:
        """Many at once, so that they wait for permits together."""
        return float(self._rng.choice([0.3, 1.2, 2.0, 3.0])) + self._rng.uniform(0, 0.3)

    def _small_or_long(self, i: int) -> PlannedRequest:
        """A steady stream of small requests, and now and then a long answer."""
        rng = self._rng
        is_long = i % 9 == 2
        prompt = self._tokens(rng.randrange(14, 40) if is_long else rng.randrange(3, 20))
        if i % 2:
            prompt = self._beginning(len(prompt) // 2) + prompt[len(prompt) // 2 :]
        is_at_once = self._shape.decode > 1  # so that much goes to the one that stands still
        return PlannedRequest(
            start_s=rng.uniform(0.2, 1.2) if is_at_once else rng.uniform(0, LOAD_S),
            name=f"r{i}",
            prompt=prompt,
            sampling=SamplingParams(
                max_tokens=rng.randrange(60, 90) if is_long else rng.randrange(4, 20),
                temperature=0.0,
                ignore_eos=True,
            ),
            scope=rng.choice(["", *SCOPES]),
        )

    def _small_or_giant(self, i: int) -> PlannedRequest:
        rng = self._rng
        is_giant = i % 8 == 1
        prompt = self._tokens(rng.randrange(300, 600) if is_giant else rng.randrange(3, 20))
        if is_giant and rng.random() < 0.5:
            prompt = self._giant_beginning + prompt[len(self._giant_beginning) :]
        return PlannedRequest(
            start_s=self._burst_s(),
            name=f"r{i}",
            prompt=prompt,
            sampling=SamplingParams(
                max_tokens=rng.randrange(2, 24),
                n=rng.choice([1, 1, 2]),
                temperature=0.0,
                prompt_logprobs=5 if is_giant and rng.random() < 0.3 else None,
            ),
            scope=rng.choice(["", *SCOPES]),
        )


def _with_tiers(rng: random.Random, plan: TrialPlan) -> TrialPlan:
    """Give half of the plans requests of different tiers, whose delays fit a trial's length."""
    if rng.random() < 0.5:
        return plan
    tiers = {
        "interactive": TierConfig(),
        "standard": TierConfig(delay_s=rng.choice([0.1, 0.5])),
        "batch": TierConfig(
            delay_s=rng.choice([1.0, 4.0]), max_running_share=rng.choice([0.5, 0.75, 1.0])
        ),
    }
    names = rng.choice([list(tiers), ["interactive", "batch"], ["interactive", *3 * ["batch"]]])
    requests = tuple(replace(planned, tier=rng.choice(names)) for planned in plan.requests)
    return replace(plan, shape=replace(plan.shape, tiers=tiers), requests=requests)


def _with_own_pools(rng: random.Random, plan: TrialPlan) -> TrialPlan:
    """Give some plans below capacity a tier that has pools of its own, and those who spill over.

    None of those on a forced path pd: a pair of pools that lacks a worker must not be a fault.
    """
    if rng.random() < 0.5 or plan.style.is_overload or plan.shape.placement.path == "pd":
        return plan
    requests = plan.requests
    if len({planned.tier for planned in requests}) == 1:
        requests = tuple(
            replace(planned, tier=rng.choice(["interactive", "standard"])) for planned in requests
        )
    owner, other = rng.sample(sorted({planned.tier for planned in requests}), 2)
    pool = PoolConfig(replicas=rng.choice([1, 1, 2]), engine=plan.shape.engine)
    pools = rng.choice([{"decode": pool}, {"prefill": pool}, {"prefill": pool, "decode": pool}])
    tiers = dict(plan.shape.tiers)
    owning = {
        "pools": OwnPoolsConfig(**pools),
        "spill_to": rng.choice([(), ("shared",), ("shared", other)]),
        "slo_ttft_s": rng.choice([0.0, 0.0, 0.05]),
    }
    tiers[owner] = tiers[owner].model_copy(update=owning)
    soaking = {"spill_to": rng.choice([(), (owner,)]), "slo_ttft_s": rng.choice([0.0, 0.05])}
    tiers[other] = tiers[other].model_copy(update=soaking)
    return replace(plan, shape=replace(plan.shape, tiers=tiers), requests=requests)


def _with_faults(
    rng: random.Random, requests: list[PlannedRequest], faults: tuple[Fault, ...]
) -> tuple[PlannedRequest, ...]:
    for fault in faults:
        index = int(fault.pick * len(requests))
        match fault.kind:
            case Kind.CANCEL:
                requests[index] = replace(requests[index], cancel_after_s=rng.uniform(0, 1.0))
            case Kind.SLOW_READER:
                requests[index] = replace(requests[index], stall_s=fault.for_s)
            case Kind.DECODER_RAISES | Kind.EMIT_RAISES:
                requests[index] = replace(requests[index], raises=fault.kind)
            case _:
                pass
    return tuple(requests)
