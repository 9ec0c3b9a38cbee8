"""How many cancels a worker remembers for attempts that are still to come."""

from dataclasses import replace

from support.virtual import run as run_cluster
from support.virtual import unit

from core.session import Role, Submit, Task
from core.types import GenerateRequest, SamplingParams
from worker import attempts

# --- a worker's -----------------------------------------------------------------------------------


def test_a_worker_remembers_so_many_cancels_and_forgets_the_oldest(monkeypatch):
    monkeypatch.setattr(attempts, "MAX_TOMBSTONES", 3)

    async def scenario(cluster):
        table = unit(cluster, Role.DECODE).attempts
        found = []
        for names in (["a", "b", "c"], ["d"], ["b", "e"]):
            for name in names:
                table.cancel(name, 5)
            for name in "abcde":
                sampling = SamplingParams(max_tokens=1)
                wanted = GenerateRequest(name, "", (1, 2), sampling, 1, 1e6, (0,))
                before = table.num_stale
                known = dict(table._tombstones)
                if name in known:
                    table.submit("router", Submit(wanted, 5, Task.LOCAL, ((),)))
                    assert table.num_stale == before + 1 and name not in table.by_run
            found.append("".join(table._tombstones))
        table.submit("router", Submit(replace(wanted, request_id="a"), 5, Task.LOCAL, ((),)))
        taken = list(table.by_run)
        table.cancel("a", 5)
        return found, taken

    found, taken = run_cluster(scenario)
    assert found == ["abc", "bcd", "dbe"], "one that is cancelled again is the newest"
    assert taken == ["a"], "what was forgotten is news"
