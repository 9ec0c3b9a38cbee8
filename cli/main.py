"""The `baton` command.

Owns arguments, messages and exit codes. Does not know how a cluster is made. Heavy modules are
imported inside the commands that need them: `baton --help` stays under 0.3 s.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cli.benches import bench
from cli.keys import keys
from cli.options import Ca, Cert, Config, Key, Output, Url
from cli.prefix import prefix
from cli.simulations import simulate
from core.errors import ServingError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        version()
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="show the version"),
    ] = False,
) -> None:
    """LLM serving with prefill and decode on separate pools of workers."""


@app.command()
def up(
    config: Config = None,
    model: Annotated[str, typer.Option(help="Hugging Face folder")] = "",
    http_port: Annotated[int, typer.Option(help="HTTP port; 0: any free one", min=-1)] = -1,
    grpc_port: Annotated[int, typer.Option(help="gRPC port; 0: any free one", min=-1)] = -1,
    local: Annotated[bool, typer.Option("--local", help="child processes instead of Ray")] = False,
    colocated: Annotated[
        bool, typer.Option("--colocated", help="one pool does both phases")
    ] = False,
    address: Annotated[str, typer.Option(help="join a running Ray cluster")] = "",
    log_format: Annotated[str, typer.Option(help="auto, text or json; config: log.format")] = "",
) -> None:
    """Start a cluster in the foreground; Ctrl-C ends it."""
    from cli.up import run_up  # noqa: PLC0415

    flags: dict[str, object] = {}
    if model:
        flags["model.path"] = model
    if http_port >= 0:
        flags["router.http_port"] = http_port
    if grpc_port >= 0:
        flags["router.grpc_port"] = grpc_port
    if colocated:
        flags["colocated"] = True
    if log_format:
        flags["log.format"] = log_format
    run_up(config, flags, address, is_local=local)


@app.command()
def status(
    url: Url = "http://127.0.0.1:8000",
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    output: Output = "table",
) -> None:
    """Show readiness, what is missing, and every worker.

    Exits with 0 if all is well, 1 if not ready, 2 if no router answers, 3 if ready but short of
    something that is configured.
    """
    from cli.status import run_status  # noqa: PLC0415
    from client.endpoints import Endpoints  # noqa: PLC0415

    raise typer.Exit(run_status(url, Endpoints(ca, cert, key), as_json=output == "json"))


@app.command()
def top(
    url: Url = "http://127.0.0.1:8000",
    interval: Annotated[
        float, typer.Option("--interval", "-n", help="time between two looks (seconds)", min=0.1)
    ] = 2.0,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    *,
    once: Annotated[
        bool, typer.Option("--once", help="show it once, after one interval, and end")
    ] = False,
    output: Output = "table",
) -> None:
    """Watch workers, tiers, KV routes and rates; Ctrl-C ends it.

    Rates and the SLO attainment are of the last minute, or since the command began, and of the
    router that answers. With `-o json` each look is one object on one line.
    """
    from cli.top import run_top  # noqa: PLC0415
    from client.endpoints import Endpoints  # noqa: PLC0415

    access = Endpoints(ca, cert, key)
    run_top(url, access, interval_s=interval, is_once=once, as_json=output == "json")


explain = typer.Typer(help="Say why.", no_args_is_help=True)
app.add_typer(explain, name="explain")


@explain.command("request")
def explain_request(
    request_id: Annotated[str, typer.Argument(help="the reply's id, or x-request-id")],
    url: Url = "http://127.0.0.1:8000",
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    output: Output = "table",
) -> None:
    """Show which workers a request could have had, what each would have cost, and what it took.

    Costs are predicted milliseconds to the first token, "total" their sum. "weighed" orders the
    candidates: computing here counts for more, since those behind it wait too, and so does room in
    the cache. The least is chosen, but for the request's key and for decode's load. "delay" is what
    sequences that decode there would lose together; a path is chosen by it and "total".

    "error" is what was measured less what was predicted of the choice. "regret" is what was
    measured, and others lost, less the same for the best other candidate. Then come attempts and
    moves, the wait for a permit, where the time went, and the charge to the key's quota. The
    request must have ended; its router keeps the newest `router.max_explained`, and tenants see
    their own.
    """
    from cli.explain import explain_request as run_explain  # noqa: PLC0415
    from client.endpoints import Endpoints  # noqa: PLC0415

    run_explain(url, request_id, Endpoints(ca, cert, key), as_json=output == "json")


@app.command()
def doctor(
    url: Url = "http://127.0.0.1:8000",
    mib: Annotated[int, typer.Option(help="moved over each KV route (MiB)", min=1, max=256)] = 16,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    output: Output = "table",
) -> None:
    """Measure every KV route, and from which prompt length on a transfer pays."""
    from cli.doctor import run_doctor  # noqa: PLC0415
    from client.endpoints import Endpoints  # noqa: PLC0415

    run_doctor(url, mib, Endpoints(ca, cert, key), as_json=output == "json")


@app.command()
def generate(  # noqa: PLR0913 - one option each
    prompt: Annotated[str, typer.Argument(help="text to continue")],
    grpc_address: Annotated[
        str, typer.Option("--grpc", help="gRPC address of a router")
    ] = "127.0.0.1:9000",
    max_tokens: Annotated[int, typer.Option(help="longest output (tokens)")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="fix the random numbers")] = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    output: Output = "table",
) -> None:
    """Continue a text and show where the time went."""
    from cli.client import generate_stream  # noqa: PLC0415
    from client.endpoints import Endpoints  # noqa: PLC0415

    access = Endpoints(ca, cert, key)
    as_json = output == "json"
    generate_stream(prompt, grpc_address, max_tokens, temperature, seed, access, as_json=as_json)


@app.command()
def chat(  # noqa: PLR0913 - one option each
    grpc_address: Annotated[
        str, typer.Option("--grpc", help="gRPC address of a router")
    ] = "127.0.0.1:9000",
    message: Annotated[
        str, typer.Option("--message", "-m", help="send this, print the answer, end")
    ] = "",
    system: Annotated[str, typer.Option(help="system message")] = "",
    max_tokens: Annotated[int, typer.Option(help="longest answer (tokens); 0: what fits")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    output: Output = "table",
) -> None:
    """Talk with the model; shows TTFT and tokens per second after each answer."""
    from cli.chat import run_chat  # noqa: PLC0415
    from client.endpoints import Endpoints  # noqa: PLC0415

    access = Endpoints(ca, cert, key)
    as_json = output == "json"
    run_chat(grpc_address, system, message, max_tokens, temperature, access, as_json=as_json)


@app.command()
def down(
    http_port: Annotated[
        int, typer.Option(help="HTTP port of the cluster to end; 0: the only one")
    ] = 0,
    address: Annotated[
        str, typer.Option(help="remove the application from a running Ray cluster")
    ] = "",
) -> None:
    """End a cluster that `baton up` started on this machine, or an application on a Ray cluster."""
    if address:
        from cluster.ray.app import remove_application  # noqa: PLC0415

        remove_application(address)
        typer.echo(f"the application is gone from the Ray cluster at {address}")
        return
    from cli.instances import stop  # noqa: PLC0415

    ended = stop(http_port)
    which = f"on HTTP port {ended.http_port}" if ended.http_port else "that was starting"
    typer.echo(f"the cluster {which} ({ended.kind}, pid {ended.pid}) has ended")


@app.command("collect-env")
def collect_env(output: Output = "table") -> None:
    """Show what a bug report needs: versions, hardware, limits; no paths, hosts or keys."""
    from cli.collect_env import collect  # noqa: PLC0415

    facts = collect()
    if output == "json":
        typer.echo(json.dumps(facts, indent=2))
        return
    import yaml  # noqa: PLC0415

    typer.echo(yaml.safe_dump(facts, sort_keys=False), nl=False)


app.add_typer(bench, name="bench")
app.add_typer(keys, name="keys")


@app.command()
def certs(
    out: Annotated[Path, typer.Option(help="folder to write to")],
    host: Annotated[
        list[str] | None,
        typer.Option(help="name or address of the servers beside localhost; repeatable"),
    ] = None,
) -> None:
    """Make development certificates: an authority, one pair for each role, one for the servers."""
    from transport.certificates import make_certificates  # noqa: PLC0415

    for path in make_certificates(out.expanduser(), host or []):
        typer.echo(path.name)


app.add_typer(prefix, name="prefix")
app.add_typer(simulate, name="simulate")


@app.command("check-config")
def check_config(config: Config = None, output: Output = "table") -> None:
    """Check a config, its model and what it names on this machine, and print the resolved tree.

    No server is started. What `baton up` would refuse here is refused.
    """
    from cli.up import check_access, warn_of_tokens_beyond  # noqa: PLC0415
    from cluster.machine_check import check_machine  # noqa: PLC0415
    from cluster.network_check import faults_between_machines  # noqa: PLC0415
    from cluster.ray.probe import endpoint_of_environment  # noqa: PLC0415
    from cluster.secrets import secrets_of, with_secrets  # noqa: PLC0415
    from cluster.served_model import kv_pools_of, model_of  # noqa: PLC0415
    from core.clocks import SystemClock  # noqa: PLC0415
    from core.config import load_config  # noqa: PLC0415
    from core.secret_references import is_reference  # noqa: PLC0415
    from router.access.certificate import ServerCertificate  # noqa: PLC0415
    from router.text.detokenizing import TextModel  # noqa: PLC0415

    # Not an event: this command prints for a person, and logs nothing.
    def warn(old: str, new: str) -> None:
        typer.echo(
            f"baton: warning: {old} is now {new}; the next release refuses the old name", err=True
        )

    resolved = load_config(config, on_renamed=warn)
    spec = model_of(resolved)
    warn_of_tokens_beyond(TextModel(spec.folder), spec.vocabulary_size)
    check_access(resolved)
    if resolved.security.door_certificate:
        ServerCertificate(resolved.security, SystemClock().now_s)  # refuses files that do not fit
    check_machine(resolved, spec)
    kv_pools = kv_pools_of(resolved, spec)
    hidden = {k: v if is_reference(v) else "***" for k, v in secrets_of(resolved).items() if v}
    tree = with_secrets(resolved, secrets_of(resolved) | hidden).model_dump()
    endpoint = endpoint_of_environment(os.environ)
    facts: dict[str, object] = {
        "model": spec.name,
        "architecture": spec.architecture,
        "dtype": spec.dtype,
        "max_model_len": spec.max_model_len,
        **kv_pools["decode"],
        "kv_pools": kv_pools,
        "in_the_way_of_several_machines": faults_between_machines(resolved, endpoint),
    }
    if output == "json":
        typer.echo(json.dumps({"config": tree, "facts": facts}, indent=2))
    else:
        import yaml  # noqa: PLC0415

        typer.echo(
            yaml.safe_dump(tree, sort_keys=False)
            + "\n# facts\n"
            + yaml.safe_dump(facts, sort_keys=False)
        )


@app.command()
def version(output: Output = "table") -> None:
    """Show the version."""
    from importlib.metadata import version as installed  # noqa: PLC0415

    number = installed("baton-serve")
    typer.echo(json.dumps({"version": number}) if output == "json" else f"baton {number}")


def main() -> None:
    """Run the command; errors of the error tree are one line, not a stack trace."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its core logs to standard error, too
    try:
        app()
    except ServingError as error:
        typer.echo(f"baton: {error.message}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
