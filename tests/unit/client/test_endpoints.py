"""What commands take from a server: its answers, and nothing that steers the terminal."""

import json

import pytest

from client.endpoints import Endpoints
from core.errors import ConfigError

URL = "http://server"
BUSY = {"error": {"message": "all connections are busy", "code": "too_many_connections"}}


@pytest.fixture
def says(monkeypatch):
    """Make the server say something."""

    def say(answer):
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        monkeypatch.setattr(Endpoints, "_exchange", lambda *_: (body, {}))
        return Endpoints()

    return say


def test_what_would_steer_a_terminal_is_written_out_wherever_it_stands(says):
    answer = says({"a\x1b[2J": ["ok \u00e9", {"b": "x\x1b]52;c;AA\x07\u009b\u202e"}], "n": 1.5})
    shown = answer.get(URL, "/x")
    assert shown == {"a\\x1b[2J": ["ok \u00e9", {"b": "x\\x1b]52;c;AA\\x07\\x9b\\u202e"}], "n": 1.5}


def test_words_of_an_error_cannot_steer_it_either(says):
    access = says({"error": {"message": "no\x1b]0;title\x07"}})
    for ask in (access.get, lambda url, path: access.post(url, path, {})):
        with pytest.raises(ConfigError) as refused:
            ask(URL, "/x")
        assert refused.value.message == r"the router at http://server refuses: no\x1b]0;title\x07"


def test_a_server_that_refuses_is_no_fault_of_the_command(says):
    access = says(BUSY)
    for ask in (access.get, lambda url, path: access.get_field(url, path, "replicas")):
        with pytest.raises(ConfigError, match="refuses: all connections are busy"):
            ask(URL, "/replicas")
    assert access.get_with_headers(URL, "/x")[0] == BUSY


@pytest.mark.parametrize("answer", [[], "text", 3, None, b"<html>", b"[" * 100_000, b"\xff"])
def test_what_is_no_object_is_no_router(says, answer):
    with pytest.raises(ConfigError, match=r"http://server/x is no router"):
        says(answer).get(URL, "/x")


def test_an_answer_without_its_field_is_no_routers(says):
    assert says({"links": [1]}).get_field(URL, "/links", "links") == [1]
    with pytest.raises(ConfigError, match=r"/links is no router"):
        says({}).get_field(URL, "/links", "links")
