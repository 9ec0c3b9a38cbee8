"""Options that several commands share, and the exit code of one that was interrupted.

Owns their names and help. Does not know commands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended, by the shells' convention."""

Output = Annotated[str, typer.Option("--output", "-o", help="table or json")]
Config = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file")]
Url = Annotated[str, typer.Option("--url", help="HTTP address of a router")]
Ca = Annotated[
    Path | None, typer.Option("--ca", help="PEM of the servers' authority; else SSL_CERT_FILE")
]
Cert = Annotated[
    Path | None, typer.Option("--cert", help="PEM to show to a server that requires a certificate")
]
Key = Annotated[Path | None, typer.Option("--key", help="PEM key of --cert, if in another file")]
