"""A small cluster on virtual time and one request to it.

Owns the start, the check that nothing is left, and the names of the parts.
"""

from core.config import PlacementConfig
from core.types import SamplingParams
from simulation.cluster import SimCluster
from simulation.loop import run_virtual
from simulation.observers import ClusterObserver
from simulation.shape import ClusterShape
from support.events import read_events

PROMPT = tuple(range(1, 60))
PD = PlacementConfig(path="pd")


class Heard(ClusterObserver):
    """Looks on from now: arrivals of steps, ends of attempts and requests, faults retried."""

    def __init__(self, cluster):
        self.arrived, self.attempts, self.ended, self.retries = [], [], [], []
        cluster.observers.join(self)

    def step(self, node, plan):
        self.arrived.extend(plan.arrived)

    def attempt_ended(self, node, attempt):
        self.attempts.append((node, attempt.ended))

    def request_ended(self, run, ended):
        self.ended.append(ended)

    def retried(self, error):
        self.retries.append(error)


def run(scenario, **shape):
    """Run a scenario on a fresh cluster, then check that nothing is left."""

    async def main():
        cluster = SimCluster(
            ClusterShape(**{"prefill": 1, "decode": 1, "placement": PD, **shape}), seed=1
        )
        await cluster.start()
        result = await scenario(cluster)
        await cluster.rest()
        await cluster.stop()
        return result

    return run_virtual(main())


async def ask(cluster, name="r", prompt=PROMPT, timeout_s=120.0, **sampling):
    params = SamplingParams(**{"max_tokens": 12, "temperature": 0.0, **sampling})
    events = await cluster.generate(cluster.request(name, prompt, params, timeout_s))
    return read_events(events), events[-1]


def attempt_of(unit, name):
    """A worker's attempt at a request: workers know it by a key of the run,
    which begins with the request's id."""
    return next((a for key, a in unit.attempts.by_run.items() if key.startswith(f"{name}~")), None)


def unit(cluster, role):
    return next(u for u in cluster.units.values() if u.descriptor.role is role)


def expected(**sampling):
    return run(lambda c: ask(c, **sampling))[0]
