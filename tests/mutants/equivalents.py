"""Mutants that change nothing anyone can see, each with the reason.

Known by path and lines, so that the list survives edits elsewhere in a file. Called by the command.
"""

from mutants.plan import Equivalent

EQUIVALENTS: list[Equivalent] = []
