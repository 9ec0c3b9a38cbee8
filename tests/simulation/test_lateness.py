"""Placement learns how late KV comes on each route, from hand-overs on virtual time."""

import asyncio

from support.virtual import ask, run

from core.session import Role

LATE_S = 0.4


def routes(cluster):
    """Exposed seconds by sender and receiver."""
    return {
        (c.worker_id, receiver): exposed_s
        for c in cluster.sessions.candidates()
        for receiver, exposed_s in c.exposed_by_receiver.items()
    }


def make_late(cluster, receiver):
    """Frames of KV that leave for one decode worker take longer by `LATE_S`."""
    node = next(n for n, u in cluster.units.items() if u.descriptor.worker_id == receiver)
    cluster.hub.extra_delay_s = lambda s: LATE_S * (s.kind == "fetch" and s.peer.node == node)


def test_a_route_on_which_kv_comes_late_is_measured_and_left_alone_until_it_may_have_healed():
    async def scenario(cluster):
        slow, fast = sorted(
            c.worker_id for c in cluster.sessions.candidates() if c.descriptor.role is Role.DECODE
        )
        make_late(cluster, slow)
        took = [(await ask(cluster, f"r{n}"))[1].timing for n in range(4)]
        known = routes(cluster)
        shown = max(view.exposed_transfer_s for view in cluster.sessions.views())
        assert shown > LATE_S / 2
        await asyncio.sleep(70.0)
        later = (await ask(cluster, "later"))[1].timing
        return slow, fast, took, known, later

    slow, fast, took, known, later = run(scenario, decode=2)
    assert took[0].decode_worker == slow and took[0].exposed_transfer_s > LATE_S
    assert took[0].placement_error_s > LATE_S, "nobody had foreseen it"
    assert took[0].why["measured"]["transfer_ms"] == round(took[0].exposed_transfer_s * 1e3, 3)
    assert [t.decode_worker for t in took[1:]].count(fast) >= 2, "one more may go there to be even"
    by_receiver = {receiver: exposed_s for (_, receiver), exposed_s in known.items()}
    assert by_receiver[slow] > LATE_S > 0.1 > by_receiver[fast]
    assert later.decode_worker == slow, "after a minute it counts as not measured"
