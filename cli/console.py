"""The console of commands that show what a server says, and their tables.

Owns that names are shown as they are: to `rich`, brackets and colons in a text are markup and
emojis. Does not know what is shown; `client.endpoints` lets nothing in that steers a terminal.
"""

from __future__ import annotations

from collections.abc import Container

from rich import box
from rich.console import Console
from rich.table import Column, Table


def plain_console() -> Console:
    """Make a console that shows every text as it is, in cells of tables, too."""
    return Console(markup=False, emoji=False)


def table_of(*columns: str, numbers: Container[str]) -> Table:
    """Return an empty table.

    Args:
        columns: Their headings.
        numbers: Those of them that hold numbers, whose last digits stand below one another.
    """
    headings = [Column(name, justify="right" if name in numbers else "left") for name in columns]
    return Table(*headings, box=box.SIMPLE)
