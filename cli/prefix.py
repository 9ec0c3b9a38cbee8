"""`baton prefix`: what a router knows of the blocks that workers cache.

Owns what is shown. Does not know how the index is kept: it asks a router.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import Ca, Cert, Key, Output, Url

prefix = typer.Typer(help="Look into the cluster's prefix index.", no_args_is_help=True)


@prefix.command()
def stats(
    url: Url = "http://127.0.0.1:8000",
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    output: Output = "table",
) -> None:
    """Show how large the router's view is, how old, and what did not count."""
    report = _read(url, ca, cert, key)
    if output == "json":
        typer.echo(json.dumps(report, indent=2))
        return
    typer.echo(
        f"store {report['state']}, last answer {report['age_s']} s ago; {report['entries']} blocks "
        f"of {len(report['workers'])} workers, {report['gaps']} gaps"
    )
    for reason, count in sorted(report["refused"].items()):
        typer.echo(f"  {count} entries did not count: {reason}")


@prefix.command()
def top(
    url: Url = "http://127.0.0.1:8000",
    limit: Annotated[int, typer.Option(help="workers to show", min=1)] = 20,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    output: Output = "table",
) -> None:
    """Show the workers that cache most blocks."""
    workers: dict[str, int] = _read(url, ca, cert, key)["workers"]
    most = sorted(workers.items(), key=lambda item: (-item[1], item[0]))[:limit]
    if output == "json":
        typer.echo(json.dumps([{"worker_id": name, "blocks": n} for name, n in most], indent=2))
        return
    for name, num_blocks in most:
        typer.echo(f"{num_blocks:>10}  {name}")


def _read(url: str, ca: Path | None, cert: Path | None, key: Path | None) -> dict[str, Any]:
    from client.endpoints import Endpoints  # noqa: PLC0415 - `baton --help` stays fast

    report: dict[str, Any] = Endpoints(ca, cert, key).get(url, "/prefix-index")
    return report
