"""How many cancels a worker remembers for attempts that are still to come."""

from dataclasses import replace

from support.virtual import run as run_cluster
from support.virtual import unit

from core.session import Credit, Role, Submit, Task
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


def test_a_newer_epoch_makes_the_older_attempt_stop():
    async def scenario(cluster):
        worker = unit(cluster, Role.DECODE)
        sampling = SamplingParams(max_tokens=1)
        wanted = GenerateRequest("r", "", (1, 2), sampling, 1, 1e6, (0,))
        for epoch in (5, 6):
            worker.attempts.submit("router", Submit(wanted, epoch, Task.LOCAL, ((),)))
        found = worker.attempts.by_run["r"].epoch, worker.attempts.scheduler.num_waiting_tokens
        before = worker.attempts.num_stale
        for credit in (Credit("r", 5, 100), Credit("nobody's", 6, 100), Credit("r", 6, 100)):
            worker.attempts.credit(credit)
        num_stale = worker.attempts.num_stale - before
        worker.attempts.cancel("r", 6)
        return *found, num_stale, worker.attempts.scheduler.num_waiting_tokens

    assert run_cluster(scenario) == (6, 2, 2, 0)
