"""Real processes to break: routers, workers and Redis as children,
clients of ours, proofs that a fault bit.

Owns the start of the cluster, the load, the comparison with the fault-free answers and the counting
of affected requests.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from pathlib import Path

import httpx

from client.stream import Client
from cluster.local import LocalCluster
from core.config import BatonConfig
from kv_transfer.transports.choice import read_address
from protos.baton.v1 import generation_pb2 as pb
from support.fault_proxy import FaultProxy
from support.slow_child import SlowCluster

ROOT = Path(__file__).parents[2]
WORDS = (
    "def class import return for while if else try except with open print self value index".split()
)


def config_of(dtype="float32", **changes):
    """Two of each role on free ports, the tiny model."""
    tree = {
        "model": {
            "path": str(ROOT / "models" / "baton-tiny"),
            "dtype": dtype,
            "name": "baton-tiny",
        },
        "router": {
            "replicas": 2,
            "http_port": 0,
            "grpc_port": 0,
            "log_requests": False,
            "tokenizer_processes": 1,
        },
        "pools": {
            "prefill": {"replicas": 2, "engine": {"num_blocks": 512}},
            "decode": {"replicas": 2, "engine": {"num_blocks": 512}},
        },
        # By length alone: what else a path costs depends on the machine.
        "placement": {"local_below_tokens": 8, "min_local_saving": 1.0},
    }
    for dotted, value in changes.items():
        node = tree
        *parents, leaf = dotted.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return BatonConfig.model_validate(tree)


def is_gone(pid):
    """The process is dead, or a zombie that waits to be reaped."""
    return state_of(pid) in ("", "Z")


def state_of(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


@dataclass
class Answer:
    """What one client received."""

    tokens: dict = field(default_factory=dict)
    text: dict = field(default_factory=dict)
    logprobs: dict = field(default_factory=dict)
    finish: dict = field(default_factory=dict)
    attempts: tuple = ()
    num_reconnects: int = 0
    longest_gap_s: float = 0.0
    ttft_s: float = 0.0
    error: str = ""
    disorder: str = ""

    @property
    def content(self):
        return self.tokens, self.text, self.logprobs, self.finish

    @property
    def is_affected(self):
        return len(self.attempts) > 1 or self.num_reconnects > 0


class Proxied(LocalCluster):
    """Workers are reached through proxies: sessions, transfers, or both."""

    def __init__(self, config, kinds):
        super().__init__(config)
        self.kinds, self.proxies = kinds, {}

    async def _start_worker(self, seat):
        await super()._start_worker(seat)
        member = self._members[seat]
        for kind in self.kinds:
            name = f"{kind}_address"
            is_transfer = kind == "transfer"  # through the proxy there is no shared memory
            target = (
                read_address(member.transfer_address)["grpc"]
                if is_transfer
                else getattr(member, name)
            )
            proxy = FaultProxy(target, seed=len(self.proxies))
            old = self.proxies.get((seat, kind))
            if old is not None:
                await old.stop()
            self.proxies[seat, kind] = proxy
            member = replaced(
                member, **{name: ("grpc=" if is_transfer else "") + await proxy.start()}
            )
        self._members[seat] = member

    async def stop(self):
        await super().stop()
        for proxy in self.proxies.values():
            await proxy.stop()


class ProcessCluster:
    """`async with ProcessCluster(config_of()) as cluster:`"""

    def __init__(self, config, proxied=(), launch_delay_s=0.0):
        if proxied:
            self.local = Proxied(config, proxied)
        elif launch_delay_s:
            self.local = SlowCluster(config, launch_delay_s)
        else:
            self.local = LocalCluster(config)
        self.rng = random.Random(7)
        self.requests = []
        self.expected = []
        self.answers = []

    async def __aenter__(self):
        await self.local.start()
        try:
            await self.wait_whole()
        except BaseException:
            await self.local.stop()
            raise
        return self

    async def __aexit__(self, *_):
        await self.local.stop()

    # --- the cluster ------------------------------------------------------------------------------

    @property
    def addresses(self):
        return [f"127.0.0.1:{grpc}" for _, grpc in self.local.addresses]

    async def replicas(self, router=0):
        async with httpx.AsyncClient(timeout=2) as http:
            reply = await http.get(f"http://127.0.0.1:{self.local.addresses[router][0]}/replicas")
            return reply.json()["replicas"]

    async def wait_whole(self, timeout_s=60):
        """Every router is ready and sees every worker live."""
        pools = self.local.config.pools
        wanted = pools.prefill.replicas + pools.decode.replicas
        async with asyncio.timeout(timeout_s), httpx.AsyncClient(timeout=2) as http:
            for index, (port, _) in enumerate(self.local.addresses):
                while True:
                    with contextlib.suppress(httpx.HTTPError):
                        live = [r for r in await self.replicas(index) if r["state"] == "live"]
                        ready = await http.get(f"http://127.0.0.1:{port}/ready")
                        if len(live) == wanted and ready.status_code == 200:
                            break
                    await asyncio.sleep(0.1)

    async def leaked(self, timeout_s=8.0):
        """What is held when nobody asks for anything: empty if all is well."""
        until = time.monotonic() + timeout_s
        while True:
            found = {}
            for r in await self.replicas():
                load = r["load"]
                held = load["total_blocks"] - load["free_blocks"] - load["cached_blocks"]
                if held or load["running"] or load["waiting"]:
                    found[r["worker_id"]] = load
            if not found or time.monotonic() > until:
                return found
            await asyncio.sleep(0.1)

    def pids(self, role):
        """Live child processes of a role: router, prefill or decode."""
        if role == "router":
            children = list(self.local._routers.values())
        else:
            children = [c for seat, c in self.local._workers.items() if seat.startswith(role)]
        return [c.process.pid for c in children if c.process.returncode is None]

    def child_pids(self):
        """All live child processes of the cluster."""
        return {pid for role in ("router", "prefill", "decode") for pid in self.pids(role)}

    # --- load -------------------------------------------------------------------------------------

    def make_requests(self, count, max_tokens=60):
        """Greedy, seeded, n = 2 and with log probabilities, in turn; prompts of all lengths."""
        kinds = [
            pb.SamplingOptions(temperature=0),
            pb.SamplingOptions(temperature=1, seed=11, top_p=0.9),
            pb.SamplingOptions(temperature=1, n=2, presence_penalty=0.5),
            pb.SamplingOptions(temperature=0.7, repetition_penalty=1.1),
        ]
        for i in range(count):
            prompt = " ".join(
                self.rng.choice(WORDS) for _ in range(self.rng.choice([3, 20, 60, 120]))
            )
            response = pb.ResponseOptions(timing=True)
            if i % 4 in (1, 3):
                response.logprobs = 2
            stop = pb.StoppingOptions(max_tokens=max_tokens, ignore_eos=True)
            self.requests.append(
                pb.GenerateRequest(
                    text=prompt, sampling=kinds[i % 4], stopping=stop, response=response
                )
            )

    async def ask(self, index, request_id, timeout_s=120.0, first_router=0):
        """One of the requests, as our client carries it."""
        request = pb.GenerateRequest()
        request.CopyFrom(self.requests[index])
        request.request_id = request_id
        return await self.carry(request, timeout_s, first_router)

    async def carry(self, request, timeout_s=120.0, first_router=0):
        """Any request, as our client carries it."""
        answer, last, started = Answer(), time.monotonic(), time.monotonic()
        addresses = self.addresses[first_router:] + self.addresses[:first_router]
        async with Client(addresses) as client:
            try:
                async for message in client.generate(request, timeout_s):
                    now = time.monotonic()
                    answer.ttft_s = answer.ttft_s or now - started
                    answer.longest_gap_s, last = max(answer.longest_gap_s, now - last), now
                    _take(answer, message)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what the client saw
                answer.error = f"{type(error).__name__}: {error}"
            answer.num_reconnects = client.num_reconnects
        return answer

    async def learn(self):
        """The fault-free answers; also the control arm: nothing is retried, nothing fails."""
        self.expected = [await self.ask(i, f"learn-{i}") for i in range(len(self.requests))]
        for i, answer in enumerate(self.expected):
            assert not answer.error and not answer.disorder, (i, answer.error, answer.disorder)
            assert len(answer.attempts) == 1 and not answer.num_reconnects, (i, answer.attempts)

    async def load(self, seconds, concurrency, timeout_s=120.0):
        """Ask again and again; the ids are the learned ones, so that the seeds are too."""
        until = time.monotonic() + seconds
        taken = [False] * len(self.requests)

        async def one(number):
            while time.monotonic() < until:
                free = [i for i, busy in enumerate(taken) if not busy]
                index = self.rng.choice(free)
                taken[index] = True
                answer = await self.ask(
                    index, f"learn-{index}", timeout_s, first_router=number % len(self.addresses)
                )
                taken[index] = False
                self.answers.append((index, answer))

        await asyncio.gather(*(one(n) for n in range(min(concurrency, len(self.requests)))))

    def verdict(self):
        """Count what happened to the answers so far, and list what is wrong with them."""
        wrong = []
        affected = [a for _, a in self.answers if a.is_affected]
        for index, answer in self.answers:
            if answer.error or answer.disorder:
                wrong.append(
                    f"request {index}: {answer.error or answer.disorder} after {answer.attempts}"
                )
            elif answer.content != self.expected[index].content:
                wrong.append(
                    f"request {index}: inexact after {answer.attempts} reconnects "
                    f"{answer.num_reconnects}"
                )
        gaps = sorted(a.longest_gap_s for a in affected) or [0.0]
        return {
            "requests": len(self.answers),
            "affected": len(affected),
            "wrong": wrong,
            "lost_upper_bound_95": round(3 / len(affected), 5) if affected else None,
            "gap_p50_s": round(gaps[len(gaps) // 2], 3),
            "gap_p99_s": round(gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))], 3),
            "gap_max_s": round(gaps[-1], 3),
        }

    # --- faults -----------------------------------------------------------------------------------

    async def kill(self, role):
        """SIGKILL one process of a role; returns its pid, gone for sure."""
        pid = self.rng.choice(self.pids(role))
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            while not is_gone(pid):
                await asyncio.sleep(0.01)
        return pid

    async def terminate(self, role, pid):
        """SIGTERM one process, as a rolling restart does; returns its exit code."""
        children = [*self.local._workers.values(), *self.local._routers.values()]
        child = next(c for c in children if c.process.pid == pid)
        os.kill(pid, signal.SIGTERM)
        async with asyncio.timeout(20):
            return await child.process.wait()

    async def hang(self, role, seconds):
        """SIGSTOP one process of a role for a while; it wakes as a zombie of its past."""
        pid = self.rng.choice(self.pids(role))
        os.kill(pid, signal.SIGSTOP)
        async with asyncio.timeout(5):
            while state_of(pid) != "T":
                await asyncio.sleep(0.01)
        await asyncio.sleep(seconds)
        assert state_of(pid) in ("T", ""), "it did not stay stopped"
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        return pid


def _take(answer, message):
    kind = message.WhichOneof("event")
    if kind == "delta":
        d = message.delta
        seen = answer.tokens.setdefault(d.choice, [])
        if d.position != len(seen) or d.choice in answer.finish:
            answer.disorder = f"position {d.position} of choice {d.choice} after {len(seen)}"
        seen += [t.token_id for t in d.tokens]
        answer.text[d.choice] = answer.text.get(d.choice, "") + d.text
        answer.logprobs.setdefault(d.choice, []).extend(
            (t.logprob, tuple((x.token_id, x.logprob) for x in t.top))
            for t in d.tokens
            if t.HasField("logprob")
        )
    elif kind == "finished":
        if message.finished.choice in answer.finish:
            answer.disorder = f"choice {message.finished.choice} finished twice"
        answer.finish[message.finished.choice] = message.finished.reason
    elif kind == "summary":
        answer.attempts = tuple(message.summary.timing.attempts)


def is_long():
    """`make test-long` runs the whole of each scenario, `make test` a sample."""
    return os.environ.get("LONG") == "1"


def note(name, facts):
    """Keep the figures of a long run."""
    if is_long():
        import sys

        sys.path.insert(0, str(ROOT))
        from benchmarks.record import save

        test = os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0]
        save(
            f"faults_{name}",
            {**json.loads(json.dumps(facts)), "command": f"LONG=1 python -m pytest {test}"},
        )
