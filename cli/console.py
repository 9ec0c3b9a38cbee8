"""The console of commands that show what a server says.

Owns that names are shown as they are: to `rich`, brackets and colons in a text are markup and
emojis. Does not know what is shown; `client.endpoints` lets nothing in that steers a terminal.
"""

from __future__ import annotations

from rich.console import Console


def plain_console() -> Console:
    """Make a console that shows every text as it is, in cells of tables, too."""
    return Console(markup=False, emoji=False)
