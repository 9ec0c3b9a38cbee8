"""Who waits at a worker while others are served.

Owns the bounds of overtaking, checked at every step and every ending of an attempt:

    F1 nobody stands still in mid-answer while many that came later are served to their end
    F2 a small prompt that could run is not held back by the steps of a giant one
    F3 a small reservation for which there is room does not wait behind one that does not fit
    F4 a hand-over is not held back by announcements to another partner

Does not know what is fair between tenants.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from core.ids import TransferId
from core.plan import StepPlan
from core.session import Role, Task
from engine.scheduling.queues import MAX_READY
from engine.scheduling.sequence import Place, Sequence, Status
from simulation.cluster import SimCluster
from simulation.observers import ClusterObserver
from simulation.report import Report
from worker.attempt import Attempt
from worker.worker import Worker

MAX_OVERTAKES = 16
"""Later ones that may pass one that waits for blocks, beside those that were in flight already."""
SMALL_TOKENS = 20
GIANT_TOKENS = 100
MAX_MISSED_STEPS = 8
MAX_LINE_S = 2.0
MAX_HELD_BACK_S = 1.0


@dataclass(slots=True)
class _Stop:
    """A sequence that stands still in mid-answer."""

    at_s: float
    due: Place
    num_overtakes: int = 0


@dataclass(slots=True)
class _InLine:
    """A hand-over whose prefill worker waits for its reservation."""

    sequence: Sequence
    room_since_s: float | None = None
    num_overtakes: int = 0


@dataclass(slots=True)
class _Record:
    """What is remembered of one worker."""

    stops: dict[int, _Stop] = field(default_factory=dict)
    missed_steps: dict[int, int] = field(default_factory=dict)
    line: dict[TransferId, _InLine] = field(default_factory=dict)
    unannounced_since_s: dict[int, float] = field(default_factory=dict)


class Fairness(ClusterObserver):
    """Watches every worker of a cluster."""

    def __init__(self, cluster: SimCluster, report: Report) -> None:
        """Look on from now; `look` is to be called a few times a second."""
        self._cluster = cluster
        self._report = report
        self._records: dict[str, _Record] = {}
        cluster.observers.join(self)

    def _of(self, node: str) -> _Record:
        return self._records.setdefault(node, _Record())

    def look(self) -> None:
        """Look at what stands in line at every worker."""
        now_s = self._cluster.clock.now_s()
        for node, unit in self._cluster.units.items():
            if node in self._cluster.paused or not unit.is_ready:
                self._of(node).line.clear()
                self._of(node).unannounced_since_s.clear()
            elif unit.descriptor.role is Role.DECODE:
                self._look_at_line(node, unit, now_s)
            else:
                self._look_at_announcements(node, unit, now_s)

    # --- F1, F2: at every step --------------------------------------------------------------------

    def step(self, node: str, plan: StepPlan) -> None:
        """Note who waits while a worker takes a step."""
        unit = self._cluster.units[node]
        record = self._of(node)
        scheduler = unit.scheduler
        now_s = self._cluster.clocks[node].now_s()
        stopped = {
            s.key: s.due
            for s in scheduler.waiting
            if not s.is_out_of_credit and s.num_output_tokens and s.started_at is not None
        }
        for key in [key for key in record.stops if key not in stopped]:
            del record.stops[key]
        for key in sorted(stopped.keys() - record.stops.keys()):
            record.stops[key] = _Stop(now_s, stopped[key])
        self._count_missed(node, unit, plan)

    def _count_missed(self, node: str, unit: Worker, plan: StepPlan) -> None:
        """Count the steps in which a giant prompt took most of the budget and a small one none."""
        record = self._of(node)
        scheduler = unit.scheduler
        giants = {s.key for s in scheduler.running if _is_giant(s)}
        if not giants:
            record.missed_steps.clear()
            return
        prompts = {s.key for s in scheduler.running if _is_prompt(s)}
        chunks = [item for item in plan.items if item.sequence_key in prompts]
        now_s = self._cluster.clocks[node].now_s()
        small = {
            s.key: s
            for s in scheduler.waiting
            if _could_run(s, unit) and not _stands_back(s, scheduler.running, now_s)
        }
        has_giant = any(item.sequence_key in giants for item in chunks)
        others = not has_giant or any(item.sequence_key not in giants for item in chunks)
        # Only steps that a giant has to itself hold a small one back.
        if not small or others:
            record.missed_steps.clear()
            return
        record.missed_steps = {key: record.missed_steps.get(key, 0) + 1 for key in small}
        for key, num_missed in record.missed_steps.items():
            # Equal, not more: reported once.
            if num_missed == MAX_MISSED_STEPS:
                self._report.violated(
                    f"F2 {node}: a prompt of {small[key].num_tokens} tokens waited for "
                    f"{num_missed} steps of a giant one"
                )

    # --- endings ----------------------------------------------------------------------------------

    def attempt_ended(self, node: str, attempt: Attempt) -> None:
        """Note the end of who stood in line."""
        unit = self._cluster.units.get(node)
        if unit is None:
            return  # it has drained: nobody stands in its line
        ended = attempt.ended
        if ended is None or not attempt.sequences or attempt.submit.task is Task.PREFILL:
            return
        record = self._of(node)
        record.line.pop(attempt.submit.transfer_id, None)
        if ended.error is not None:
            return
        # Those that ran when it stopped finish before it, and so may those that were arriving.
        most = MAX_OVERTAKES + 2 * unit.scheduler.limits.max_sequences
        for key, stop in record.stops.items():
            # One that reached its router before the stopped one, and this worker only now, is due.
            first = attempt.sequences[0]
            stop.num_overtakes += first.arrived_at > stop.at_s and first.due > stop.due
            if stop.num_overtakes == most + 1:
                self._report.violated(
                    f"F1 {node}: {most} requests that came after sequence {key} stopped in "
                    f"mid-answer were served before it went on"
                )

    # --- F3, F4: now and then ---------------------------------------------------------------------

    def _look_at_line(self, node: str, unit: Worker, now_s: float) -> None:
        line = self._of(node).line
        for attempt in unit.attempts.by_run.values():
            is_asking = attempt.submit.transfer_id in self._cluster.traps.asking.get(node, {})
            if attempt.submit.task is Task.DECODE and attempt.ended is None and is_asking:
                line.setdefault(attempt.submit.transfer_id, _InLine(attempt.sequences[0]))
        left = [i for i, w in line.items() if w.sequence.status is not Status.RESERVING]
        ids = list(line)
        # Before they leave the line: those that arrived have overtaken everyone in front.
        for transfer_id in left:
            if line[transfer_id].sequence.status is Status.ARRIVING:
                for before in ids:
                    if (
                        before in line
                        and line[before].sequence.due < line[transfer_id].sequence.due
                    ):
                        line[before].num_overtakes += 1
            del line[transfer_id]
        for waiting in line.values():
            self._check_room(node, unit, waiting, now_s)

    def _check_room(self, node: str, unit: Worker, waiting: _InLine, now_s: float) -> None:
        sequence = waiting.sequence
        line = self._of(node).line
        needed = unit.scheduler.tables.blocks_for(sequence.num_tokens) + len(sequence.choices)
        num_before, num_kept_blocks = _kept_before(sequence, unit)
        has_blocks = num_kept_blocks + needed <= unit.pool.num_available
        has_room = has_blocks and _has_place(unit, num_before)
        is_bounded = any(
            other.num_overtakes >= MAX_OVERTAKES // 2
            for other in line.values()
            if other.sequence.due < sequence.due
        ) or any(
            s.num_overtaken >= MAX_OVERTAKES // 2 and s.due < sequence.due
            for s in unit.scheduler.waiting.ready
        )
        is_refused = bool(self._cluster.rare_choices.failing_allocations.get(node, 0))
        if not has_room or is_bounded or is_refused:
            waiting.room_since_s = None
            return
        # Room must last: a block that is free for one look may be taken before the next step.
        if waiting.room_since_s is None:
            waiting.room_since_s = now_s
        if now_s - waiting.room_since_s > MAX_LINE_S:
            self._report.violated(
                f"F3 {node}: a reservation of {needed} blocks stood in line for {MAX_LINE_S:g} s "
                f"while there was room for it"
            )

    def _look_at_announcements(self, node: str, unit: Worker, now_s: float) -> None:
        """Only while nothing runs there: then nothing but the announcements is waited for."""
        since_s = self._of(node).unannounced_since_s
        scheduler = unit.scheduler
        unanswered = {
            s.key: s.handover
            for s in scheduler.waiting
            if s.handover and not s.handover.is_partnered
        }
        busy = {h.partner for h in unanswered.values() if h.is_announced}
        # With enough ready to start, or with steps to take, nobody has to be announced.
        is_bound = bool(busy) and not scheduler.running and len(scheduler.waiting.ready) < MAX_READY
        held_back = [
            key
            for key, handover in unanswered.items()
            if is_bound and not handover.is_announced and handover.partner not in busy
        ]
        for key in [key for key in since_s if key not in held_back]:
            del since_s[key]
        for key in held_back:
            if now_s - since_s.setdefault(key, now_s) > MAX_HELD_BACK_S:
                self._report.violated(
                    f"F4 {node}: a hand-over to {unanswered[key].partner} was not announced for "
                    f"{MAX_HELD_BACK_S:g} s, those to {sorted(busy)} were"
                )


def _is_prompt(sequence: Sequence) -> bool:
    """True for one that needs a chunk: also one that computes again what a preemption took."""
    return not sequence.num_output_tokens or sequence.num_missing_tokens > 1


def _is_giant(sequence: Sequence) -> bool:
    return not sequence.num_output_tokens and sequence.num_missing_tokens > GIANT_TOKENS


def _stands_back(sequence: Sequence, running: Iterable[Sequence], now_s: float) -> bool:
    """True for one of a lower tier than a giant that runs, before it has waited its delay."""
    giants = [s for s in running if _is_giant(s)]
    return sequence.due[0] > now_s and any(s.delay_s < sequence.delay_s for s in giants)


def _kept_before(sequence: Sequence, unit: Worker) -> tuple[int, int]:
    """Places and blocks of older ones that will run with the next step, however late it comes."""
    num_places = 0
    num_blocks = 0
    for older in unit.scheduler.waiting.ready:
        if older.due >= sequence.due or older.status is not Status.WAITING:
            continue
        num_needed = unit.scheduler.tables.blocks_for(older.num_tokens)
        if num_blocks + num_needed <= unit.pool.num_available:
            num_places += 1
            num_blocks += num_needed
    return num_places, num_blocks


def _has_place(unit: Worker, num_before: int = 0) -> bool:
    """True for a place beside those that `num_before` others will have with the next step."""
    scheduler = unit.scheduler
    num_taken = len(scheduler.active) + len(scheduler.arriving) + num_before
    return num_taken < scheduler.limits.max_sequences


def _could_run(sequence: Sequence, unit: Worker) -> bool:
    """True for a small fresh prompt that nothing but the budget keeps waiting."""
    scheduler = unit.scheduler
    if sequence.num_tokens > SMALL_TOKENS or sequence.is_out_of_credit or sequence.run_alone:
        return False
    if sequence.is_ahead:
        return False
    if not _has_place(unit) or any(s.run_alone for s in scheduler.active):
        return False
    if any(s.num_overtaken >= MAX_OVERTAKES or s.run_alone for s in scheduler.waiting.ready):
        return False  # kept: blocks for one passed often enough, or the places for one alone
    return scheduler.tables.blocks_for(sequence.num_tokens) < scheduler.pool.num_available
