"""The walk down the waiting line: how far it looks."""

import pytest
from support.stepping import SMALL, Engine, request

from core.errors import PoolExhausted
from engine.scheduling.block_supply import LOOK_AHEAD
from engine.scheduling.sequence import Status


@pytest.mark.parametrize("num_in_front", [LOOK_AHEAD - 1, LOOK_AHEAD])
def test_a_walk_passes_over_a_bounded_number_of_those_that_do_not_fit(num_in_front):
    """However long the line is, a step's walk down it is not."""
    engine = Engine(num_blocks=20, block=4, cache=False, max_sequences=99)
    engine.arrive(request("hog", [1] * 20, max_tokens=40))
    giants = [engine.arrive(request(f"g{i}", [2] * 60, **SMALL)) for i in range(num_in_front)]
    small = engine.arrive(request("small", [3] * 4, **SMALL))
    assert {giant.status for giant in giants} == {Status.RESERVING}
    is_reached = num_in_front < LOOK_AHEAD
    assert small.status is (Status.ARRIVING if is_reached else Status.RESERVING)
    engine.scheduler.cancel(giants[0])
    engine.scheduler.reserve_in_turn(0.0)
    assert small.status is Status.ARRIVING


def test_a_table_that_cannot_be_filled_holds_none_of_the_blocks_that_it_would_share():
    engine = Engine(num_blocks=8, block=4)
    tables, pool = engine.scheduler.tables, engine.pool
    sequence = engine.submit(request("r", [1] * 12, **SMALL))
    held = pool.allocate(2)
    with pytest.raises(PoolExhausted):
        tables.allocate(sequence, held, 7, 0)
    assert [pool.references(block_id) for block_id in held] == [1, 1]
    assert sequence.block_table == [] and pool.num_available == 6


def test_one_that_has_its_blocks_was_overtaken_by_nobody_any_more():
    engine = Engine(num_blocks=20, block=4, cache=False)
    hog = engine.arrive(request("hog", [1] * 20, max_tokens=40))
    giant = engine.arrive(request("giant", [2] * 60, **SMALL))
    small = engine.arrive(request("small", [3] * 4, **SMALL))
    assert (small.status, small.num_overtaken) == (Status.ARRIVING, 0)
    assert (giant.status, giant.num_overtaken) == (Status.RESERVING, 1)
    engine.scheduler.cancel(hog)
    engine.scheduler.reserve_in_turn(0.0)
    assert (giant.status, giant.num_overtaken) == (Status.ARRIVING, 0)
