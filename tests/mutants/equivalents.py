"""Mutants that change nothing anyone can see, each with the reason.

Known by path and lines, so that the list survives edits elsewhere in a file. Called by the command.
"""

from mutants.plan import Equivalent

EQUIVALENTS: list[Equivalent] = [
    Equivalent(
        "kv_transfer/sender.py",
        "LAST_SUB_ATTEMPT = (1 << 16) - 1",
        "LAST_SUB_ATTEMPT = (2 << 16) - 1",
        "it stands for all sub-attempts, and is never sent: any number above them does",
    ),
    Equivalent(
        "router/orchestrator.py",
        "age_s=max(0.0, self._clock.now_s() - run.timeline.received_at),",
        "age_s=max((-1.0), self._clock.now_s() - run.timeline.received_at),",
        "one clock, which does not go back: the difference is never negative",
    ),
    Equivalent(
        "router/detokenizing.py",
        "others = [b for b in range(256) if b not in printable]",
        "others = [b for b in range(255) if b not in printable]",
        "byte 255 is printable, so it is not among the others either way",
    ),
]
