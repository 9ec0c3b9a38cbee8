"""Requests that opened published holes in other servers; docs/cves.md lists the holes.

Each is refused by name, or what it abuses is ignored and named, and nothing is ever fetched for it.
"""

import asyncio
import socket

import pytest
from support.router_servers import RouterServers

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
IMAGE = "data:image/png;base64," + "A" * 100
ENDLESS = "{% for i in range(10**9) %}x{% endfor %}"


def chat(**fields):
    return CHAT, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, **fields}


def text(**fields):
    return TEXT, {"prompt": "a", "max_tokens": 1, **fields}


def media(kind, url):
    part = {"type": kind, kind: {"url": url}}
    return CHAT, {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}


REFUSED = {
    "CVE-2025-6242": media("image_url", "http://127.0.0.1:{port}/x.png"),
    "CVE-2026-22778": media("video_url", IMAGE),
    "CVE-2026-22778 in line": media("image_url", IMAGE),
    "CVE-2025-48942": chat(guided_json={"type": "nonsense"}),
    "CVE-2025-48943": chat(structured_outputs={"regex": "(a+)+$"}),
    "CVE-2025-48944": chat(
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"pattern": "["}}}]
    ),
    "CVE-2025-61620": chat(chat_template=ENDLESS),
    "CVE-2025-62426": chat(chat_template_kwargs={"tokenize": True}),
    "CVE-2025-62426 with a template": chat(chat_template_kwargs={"chat_template": ENDLESS}),
    "CVE-2026-34756": text(n=16384),
    "CVE-2026-34756 by another name": text(best_of=16384),
    "CVE-2025-62164 as token ids": text(prompt=[2**40]),
}
HARMLESS = {
    "CVE-2026-0599": chat(messages=[{"role": "user", "content": "![](http://127.0.0.1:{port}/x)"}]),
    "CVE-2025-62164": text(prompt_embeds="AAAA"),
    "CVE-2026-7304": text(custom_logit_processor="80049563"),
}
ADMIN = (
    "/collective_rpc",
    "/update_weights_from_disk",
    "/load_lora_adapter_from_tensors",
    "/sleep",
    "/server_info",
    "/reset_prefix_cache",
    "/v1/load_lora_adapter",
    "/flush_cache",
    "/pause",
    "/start_profile",
    "/invocations",
    "/api/jobs/",
    "/docs/../../etc/passwd",
)


@pytest.fixture()
async def servers(tmp_path):
    async with RouterServers(tmp_path).opened() as opened:
        yield opened


@pytest.fixture()
async def lure():
    """A port that requests name; whoever is sent there is counted."""
    visits = []

    async def visited(_, writer):
        visits.append(writer.get_extra_info("peername"))
        writer.close()

    server = await asyncio.start_server(visited, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield port
        with socket.create_connection(("127.0.0.1", port)) as proof:
            async with asyncio.timeout(10):
                while not visits:
                    await asyncio.sleep(0.01)
            assert visits == [proof.getsockname()], "somebody else came"


def with_port(tree, port):
    """Put the lure's port wherever a request names an address."""
    if isinstance(tree, dict):
        return {key: with_port(value, port) for key, value in tree.items()}
    if isinstance(tree, list):
        return [with_port(value, port) for value in tree]
    return tree.replace("{port}", str(port)) if isinstance(tree, str) else tree


@pytest.mark.parametrize("name", REFUSED)
async def test_what_opened_others_is_refused_by_name_and_shortly(servers, lure, name):
    path, body = REFUSED[name]
    async with servers.web("acme") as http:
        reply = await http.post(path, json=with_port(body, lure))
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["code"] in ("invalid_value", "unsupported_parameter")
    assert len(reply.content) < 1024


@pytest.mark.parametrize("name", HARMLESS)
async def test_what_is_taken_goes_the_way_of_any_request(servers, lure, name):
    path, body = HARMLESS[name]
    async with servers.web("acme") as http:
        reply = await http.post(path, json=with_port(body, lure))
    assert reply.json()["error"]["code"] == "no_worker"


@pytest.mark.parametrize("field", ["prompt_embeds", "custom_logit_processor"])
async def test_fields_that_carried_code_elsewhere_are_unknown_here(tmp_path, field):
    async with (
        RouterServers(tmp_path, strict=True).opened() as servers,
        servers.web("acme") as http,
    ):
        path, body = text(**{field: "80049563"})
        reply = await http.post(path, json=body)
    assert reply.status_code == 400
    assert field in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", ADMIN)
async def test_no_route_of_another_servers_operator_is_here(servers, path):
    """Open to strangers in other servers: CVE-2023-48022,
    CVE-2026-27482 and vLLM's own warnings."""
    async with servers.web() as stranger, servers.web("operator") as operator:
        for method in ("GET", "POST", "DELETE"):
            assert (await stranger.request(method, path)).status_code == 401
            assert (await operator.request(method, path)).status_code in (404, 405)
