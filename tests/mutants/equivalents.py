"""Mutants that change nothing anyone can see, each with the reason.

Known by path and lines, so that the list survives edits elsewhere in a file. Called by the command.
"""

from mutants.plan import Equivalent

EQUIVALENTS: list[Equivalent] = [
    Equivalent(
        "router/detokenizing.py",
        "others = [b for b in range(256) if b not in printable]",
        "others = [b for b in range(255) if b not in printable]",
        "byte 255 is printable, so it is not among the others either way",
    ),
]
