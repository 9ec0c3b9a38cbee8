"""Bytes in the store: only those of this cluster, in this place and whole, are read."""

from router.quotas.ledger import Amount, Ledger
from router.quotas.values import ClockValue, ValueCodec

CODEC = ValueCodec("a secret of sufficient length")


def ledger():
    made = Ledger("a")
    made.charge(10, Amount(1, 2**40))
    made.begin("x", "one", Amount(1, 5), 10_000)
    return made


def test_a_ledger_comes_back_as_it_was():
    made = ledger()
    value = CODEC.read_ledger("key", CODEC.write_ledger("key", made, 12_345))
    assert value.now_ms == 12_345
    back = Ledger("a", {(r, s): slot for r, s, slot in value.slots}, value.runs)
    assert (back.slots, back.runs) == (made.slots, made.runs)
    assert back.used(10) == (1, 2**40)


def test_a_clock_comes_back_as_it_was():
    value = ClockValue("a:1", 5, "a:0", -1)
    assert CODEC.read_clock("clock", CODEC.write_clock("clock", value)) == value


def test_what_no_router_of_this_cluster_wrote_there_is_not_read():
    good = CODEC.write_ledger("key", ledger(), 1)
    assert CODEC.read_ledger("other", good) is None
    assert ValueCodec("another secret of length").read_ledger("key", good) is None
    for index in range(len(good)):
        bent = good[:index] + bytes([good[index] ^ 1]) + good[index + 1 :]
        assert CODEC.read_ledger("key", bent) is None
    assert CODEC.read_ledger("key", good[:-1]) is None
    assert CODEC.read_ledger("key", b"") is None


def test_a_value_of_another_kind_is_not_read():
    clock = CODEC.write_clock("key", ClockValue("a:1", 5, "a:0", -1))
    assert CODEC.read_ledger("key", clock) is None
