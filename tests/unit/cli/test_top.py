"""`baton top` as it is drawn, and how it goes on and ends."""

import itertools
import json
from dataclasses import replace

import pytest
from support.top_snapshots import FIRST, READINESS, SECOND
from typer.testing import CliRunner

from cli import top
from cli.console import plain_console
from cli.main import app
from cli.top_figures import Window
from core.errors import ConfigError


def drawn(*snapshots, **more):
    window = Window()
    for one in snapshots:
        window.add(one)
    console = plain_console()
    console.width = 160
    with console.capture() as captured:
        console.print(top.draw({**window.figures(), **more}))
    return captured.get()


def row(text, name):
    [found] = [line.split() for line in text.splitlines() if line.split()[:1] == [name]]
    return found[1:]


def test_it_shows_the_state_and_the_rates_first():
    lines = drawn(FIRST, SECOND).splitlines()
    assert lines[0].strip() == (
        "m at router-1: degraded; store ok; in the last 10 s 4.0 requests/s, 100.0 prompt and 80.0 "
        "output tokens/s, 3.0 MB/s of KV"
    )
    assert lines[1].strip() == "pool_short: 1 of 2 decode workers are ready"


def test_it_shows_every_worker_tier_and_transport():
    text = drawn(FIRST, SECOND)
    assert row(text, "decode-0") == "decode shared live 3 0 0 █████░░░░░ 52% 10% 0.5".split()
    assert row(text, "prefill-0") == "prefill shared live 0 2 900 ░░░░░░░░░░ 0% 75% 0.0".split()
    assert row(text, "decode-1")[2] == "dialling"
    assert row(text, "interactive") == "2 0 0 90.0% 4.0 80.0".split()
    assert row(text, "batch") == "1 7 4 - 0.0 0.0".split()
    assert row(text, "shm") == "2 0 0.250 ms 2.25 GB/s".split()
    assert row(text, "none") == "1 1 0.000 ms not measured".split()
    assert text.index("decode-0") < text.index("decode-1") < text.index("prefill-0")


def test_what_cannot_be_told_yet_is_a_dash():
    text = drawn(FIRST)
    assert "in the last 0 s - requests/s, - prompt and - output tokens/s, - MB/s of KV" in text
    assert row(text, "interactive") == "2 0 0 - - -".split()


def test_a_name_is_shown_as_it_is_and_is_no_markup():
    name = "[/x][red]:key:"
    odd = {**FIRST.replicas[0], "worker_id": name}
    assert name in drawn(replace(FIRST, replicas=[odd], tiers={}))


def test_it_says_when_the_router_has_stopped_answering():
    assert "  not up to date: nobody there" in drawn(FIRST, SECOND, error="nobody there")


@pytest.fixture
def looks(monkeypatch):
    """What the router says at each look; an exception is raised."""
    said = []

    def read(url, access, router=""):
        one = said.pop(0)
        if isinstance(one, BaseException):
            raise one
        return one

    monkeypatch.setattr(top, "read_snapshot", read)
    return said


def objects(output):
    return [json.loads(line) for line in output.splitlines()]


def run(**given):
    waited = []
    top.run_top("u", None, interval_s=0.5, as_json=True, wait=waited.append, **given)
    return waited


def test_once_is_one_object_with_rates_and_json_goes_on_until_ctrl_c(looks, capsys):
    looks += [FIRST, SECOND]
    assert run(is_once=True) == [0.5]
    [found] = objects(capsys.readouterr().out)
    assert found["requests_per_s"] == 4.0 and found["workers"][0]["worker_id"] == "prefill-0"
    looks += [FIRST, SECOND, KeyboardInterrupt()]
    assert run(is_once=False) == [0.5, 0.5]
    first, second = objects(capsys.readouterr().out)
    assert first["requests_per_s"] is None and second == found


def test_a_router_that_restarts_is_asked_again_and_one_that_never_answers_is_an_error(
    looks, capsys
):
    looks += [FIRST, ConfigError("nobody there"), SECOND, KeyboardInterrupt()]
    run(is_once=False)
    first, lost, again = objects(capsys.readouterr().out)
    assert lost == {**first, "error": "nobody there"}
    assert again["requests_per_s"] == 4.0 and "error" not in again
    looks += [ConfigError("nobody there")]
    with pytest.raises(ConfigError):
        run(is_once=False)


class Routers:
    """Several behind one address, which answer in turn."""

    def __init__(self, *names):
        self.names = names
        self._turns = itertools.count()

    def _headers(self):
        name = self.names[next(self._turns) % len(self.names)]
        return {"x-baton-router": name, "x-baton-num-routers": str(len(self.names))}

    def get_text(self, url, path):
        headers = self._headers()
        count = 1 + self.names.index(headers["x-baton-router"])
        return f'baton_requests_total{{outcome="finished"}} {count}\n', headers

    def get_with_headers(self, url, path):
        headers = self._headers()
        return {"tiers": {"batch": {"running": headers["x-baton-router"]}}}, headers

    def get(self, url, path):
        return READINESS

    def get_field(self, url, path, name):
        return []

    def get_fields(self, url, path, *names):
        return [[] for _ in names]


def test_one_router_is_watched_of_those_behind_an_address_and_another_once_it_is_gone():
    routers = Routers("a", "b", "c")
    for wanted, shown in (("", "a"), ("b", "b"), ("b", "b"), ("c", "c")):
        found = top.read_snapshot("u", routers, wanted)
        assert found.router == shown
        assert found.tiers["batch"]["running"] == shown
        assert set(found.totals.values()) == {1 + "abc".index(shown)}
    routers.names = ("d",)
    assert top.read_snapshot("u", routers, "c").router == "d"


def test_ctrl_c_is_no_error_of_the_command(looks):
    looks += [FIRST, KeyboardInterrupt()]
    done = CliRunner().invoke(app, ["top", "--interval", "0.1"])
    assert done.exit_code == 0 and "interactive" in done.output, done.output
    assert "Aborted" not in done.output
