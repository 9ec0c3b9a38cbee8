"""What prefill measured comes behind the whole answer: usage waits for it, for a moment."""

import asyncio

import pytest
from support.prefixes import LONG, fetching, plain
from support.virtual import ask

from router.attempt_state import AttemptState
from router.attempts import REPORT_WAIT_S


@pytest.mark.parametrize(("late_s", "is_waited_for"), [(0.2, True), (20.0, False)])
def test_usage_has_what_prefill_found_if_it_is_said_soon(late_s, is_waited_for, monkeypatch):
    def late(name):
        tell = getattr(AttemptState, name)

        def told(self, worker_id, message):
            if worker_id == self.placement.prefill.worker_id:
                asyncio.get_running_loop().call_later(late_s, tell, self, worker_id, message)
            else:
                tell(self, worker_id, message)

        monkeypatch.setattr(AttemptState, name, told)

    async def scenario(cluster):
        _, first = await ask(cluster, "first", LONG)
        late("on_delta")
        late("on_ended")
        tokens, second = await ask(cluster, "second", LONG)
        monkeypatch.undo()
        await asyncio.sleep(2 * late_s)
        return first, tokens, second

    first, tokens, second = fetching(scenario, prefill=1)
    assert tokens == plain(LONG) and second.error is None
    assert second.timing.attempts == ("0:pd:ok",)
    assert (second.usage.cached_tokens > 0) is is_waited_for
    assert second.timing.e2e_s <= first.timing.e2e_s + REPORT_WAIT_S
