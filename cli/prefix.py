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
    typer.echo(f"{'blocks':>10}  worker")
    for name, num_blocks in most:
        typer.echo(f"{num_blocks:>10}  {name}")


@prefix.command()
def explain(  # noqa: PLR0913 - options of a command
    prompt: Annotated[str, typer.Argument(help="the text; @FILE: read it from a file")] = "",
    ids: Annotated[Path | None, typer.Option(help="JSON list of token ids instead")] = None,
    messages: Annotated[Path | None, typer.Option(help="JSON list of messages instead")] = None,
    url: Url = "http://127.0.0.1:8000",
    tenant: Annotated[
        str | None, typer.Option(help="whose cache; default: the key's own; others: admins only")
    ] = None,
    salt: Annotated[str, typer.Option(help="the cache_salt of the requests meant")] = "",
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    *,
    chat: Annotated[bool, typer.Option("--chat", help="the text is a user's message")] = False,
    output: Output = "table",
) -> None:
    """Show which workers hold how much of a prompt, and where it would be sent now.

    Of each worker: the prompt's leading blocks that it has published, by the storage tier in which
    they lie, and as "expected" how many more prompts on their way there are about to bring. Then
    the candidates, as `baton explain request` shows them.
    """
    from cli.explain import explain_prompt  # noqa: PLC0415 - `baton --help` stays fast
    from client.endpoints import Endpoints  # noqa: PLC0415

    body: dict[str, Any] = {"cache_salt": salt} | ({} if tenant is None else {"tenant": tenant})
    if sum((bool(prompt), ids is not None, messages is not None)) != 1:
        raise typer.BadParameter("give one of PROMPT, --ids and --messages")
    if ids is not None:
        body["prompt"] = _list_of(ids)
    elif messages is not None:
        body["messages"] = _list_of(messages)
    else:
        text = _text_of(Path(prompt[1:])) if prompt.startswith("@") else prompt
        body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    explain_prompt(url, body, Endpoints(ca, cert, key), as_json=output == "json")


def _text_of(file: Path) -> str:
    try:
        return file.expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file} is no text in UTF-8: {error}") from error


def _list_of(file: Path) -> list[Any]:
    text = _text_of(file)
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{file} is no JSON: {error}") from error
    if not isinstance(found, list):
        raise typer.BadParameter(f"{file} holds no JSON list")
    return found


def _read(url: str, ca: Path | None, cert: Path | None, key: Path | None) -> dict[str, Any]:
    from client.endpoints import Endpoints  # noqa: PLC0415 - `baton --help` stays fast

    report: dict[str, Any] = Endpoints(ca, cert, key).get(url, "/prefix-index")
    return report
