"""`baton keys`: the file is changed as a whole, by one at a time, and holds what it should."""

import json
import threading
import time

import pytest
from typer.testing import CliRunner

from cli.main import app
from core.errors import ConfigError
from router.access.credentials import Keyring
from router.access.key_file import change_keys, read_keys

NOW_S = 1.8e9


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr("cli.keys._now_s", lambda: NOW_S)
    return tmp_path / "keys"


def baton(file, command, *arguments, code=0):
    run = CliRunner().invoke(app, ["keys", command, "--file", str(file), *arguments])
    assert run.exit_code == code, run.output
    return run.stdout.strip()


def listed(file, code=0):
    return json.loads(baton(file, "list", "-o", "json", code=code))


def opens(file, key, wall_s=NOW_S):
    ring = Keyring(str(file), time.monotonic, lambda: wall_s)
    try:
        return ring.identify(f"Bearer {key}")
    except Exception as error:
        assert type(error).__name__ == "Unauthenticated"
        return None


def test_a_key_is_added_listed_and_taken_back(file):
    key = baton(
        file, "add", "--tenant", "acme", "--tier", "batch", "--role", "metrics", "--expires", "90d"
    )
    other = baton(file, "add", "--tenant", "bulk")
    assert file.stat().st_mode & 0o777 == 0o600
    rows = listed(file)["keys"]
    assert rows[0] == {
        "name": key.split("-")[1],
        "tenant": "acme",
        "tier": "batch",
        "class": "default",
        "role": "metrics",
        "expires": "2027-04-15T08:00:00Z",
        "state": "valid",
        "requests_per_minute": None,
        "tokens_per_minute": None,
    }
    assert (rows[1]["tenant"], rows[1]["role"], rows[1]["expires"]) == ("bulk", "tenant", "")
    table = baton(file, "list")
    assert "acme" in table and key.split("-")[2] not in table
    baton(file, "revoke", rows[0]["name"])
    assert opens(file, key) is None and opens(file, other).tenant == "bulk"
    baton(file, "revoke", other)
    assert listed(file) == {"keys": [], "refused": []}


def test_a_key_has_a_class_and_keeps_it_when_it_is_replaced(file):
    key = baton(file, "add", "--tenant", "acme", "--class", "gold")
    baton(file, "rotate", key)
    assert [row["class"] for row in listed(file)["keys"]] == ["gold", "gold"]
    assert "gold" in baton(file, "list")
    before = file.read_bytes()
    run = CliRunner().invoke(
        app, ["keys", "add", "--file", str(file), "--tenant", "x", "--class", "No!"]
    )
    assert isinstance(run.exception, ConfigError) and "class is 'No!'" in run.exception.message
    assert file.read_bytes() == before


def test_the_list_shows_the_limits_of_each_keys_tier_where_the_config_is_given(
    file, tmp_path, monkeypatch
):
    """Those of the default tier for a key that has none, or one that the config has not."""
    config = tmp_path / "baton.yaml"
    config.write_text(
        "default_tier: free\ntiers:\n  free: {requests_per_minute: 20, tokens_per_minute: 10000}\n"
    )
    for tier in ("free", "batch", "default", "gone"):
        baton(file, "add", "--tenant", "acme", "--tier", tier)
    rows = json.loads(baton(file, "list", "-c", str(config), "-o", "json"))["keys"]
    limits = [(row["requests_per_minute"], row["tokens_per_minute"]) for row in rows]
    assert limits == [(20, 10000), (0, 0), (20, 10000), (20, 10000)]
    monkeypatch.setenv("COLUMNS", "160")
    table = baton(file, "list", "-c", str(config))
    assert "requests/min" in table and "10000" in table
    assert "requests/min" not in baton(file, "list"), "without the config nobody knows"


def test_a_key_is_taken_back_whatever_else_is_in_the_file(file):
    key = baton(file, "add", "--tenant", "acme")
    kept = "# Schlüssel für bulk".encode("latin-1") + b"\nhalf a line\n"
    file.write_bytes(file.read_bytes() + kept)
    assert "line 3" in listed(file, code=1)["refused"][0]
    baton(file, "revoke", key)
    assert file.read_bytes() == kept, "every other byte stays"


def test_a_line_that_was_cut_off_stays_refused_whatever_is_changed(file):
    baton(file, "add", "--tenant", "acme")
    ops = baton(file, "add", "--tenant", "ops", "--role", "metrics", "--expires", "90d")
    file.write_text(file.read_text().partition(" role=")[0])
    late = baton(file, "add", "--tenant", "late")
    assert opens(file, late).tenant == "late", "a line without an end does not swallow the next"
    assert opens(file, ops) is None, "nor does it get an end and more rights than it had"
    assert "line 2: has no newline at its end" in listed(file, code=1)["refused"][0]
    baton(file, "revoke", ops)
    assert listed(file)["refused"] == [] and opens(file, late).tenant == "late"


def test_a_key_is_taken_back_from_the_file_behind_a_link(file, tmp_path):
    link = tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to("../keys")
    key = baton(link, "add", "--tenant", "acme")
    assert opens(file, key).tenant == "acme"
    baton(link, "revoke", key)
    assert opens(file, key) is None and link.is_symlink()


def test_a_new_key_never_has_the_name_of_another(file, monkeypatch):
    """Names have 32 bits: of 10,000 keys two are alike in one file of a hundred."""
    names = ["aaaaaaaa", "aaaaaaaa", "bbbbbbbb", "aaaaaaaa", "cccccccc"]
    drawn = iter([part for i, name in enumerate(names) for part in (name, str(i) * 32)])
    monkeypatch.setattr("router.access.credentials.secrets.token_hex", lambda _: next(drawn))
    first = baton(file, "add", "--tenant", "acme")
    assert baton(file, "add", "--tenant", "bulk") == "bt-bbbbbbbb-" + "2" * 32
    assert baton(file, "rotate", "aaaaaaaa") == "bt-cccccccc-" + "4" * 32
    assert opens(file, first).tenant == "acme" and listed(file)["refused"] == []


def test_one_that_is_not_there_is_not_taken_back_and_nothing_changes(file):
    key = baton(file, "add", "--tenant", "acme")
    before = file.read_bytes()
    for name in ("00000000", "nonsense"):
        run = CliRunner().invoke(app, ["keys", "revoke", "--file", str(file), key, name])
        assert run.exit_code != 0 and file.read_bytes() == before
    run = CliRunner().invoke(app, ["keys", "revoke", "--file", str(file) + "x", key])
    assert isinstance(run.exception, ConfigError)
    assert [p.name for p in file.parent.iterdir()] == ["keys"], "no other file is made"


def test_a_key_is_replaced_by_one_of_the_same_rights_and_ends_after_a_while(file):
    old = baton(file, "add", "--tenant", "acme", "--tier", "batch", "--role", "admin")
    new = baton(file, "rotate", old.split("-")[1], "--overlap", "2h")
    assert opens(file, old) == opens(file, new) and opens(file, new).role.value == "admin"
    later = NOW_S + 2 * 3600 + 1
    assert opens(file, old, later) is None and opens(file, new, later).tenant == "acme"


def test_a_replaced_key_never_lives_longer_than_it_would_have(file):
    old = baton(file, "add", "--tenant", "acme", "--expires", "1h")
    baton(file, "rotate", old)
    assert opens(file, old, NOW_S + 3601) is None


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--role", "king"),
        ("--expires", "soon"),
        ("--expires", "-1d"),
        ("--expires", "2027-13-01"),
        ("--expires", "0001-01-01T00:00+05:00"),
        ("--expires", "9999-12-31T23:00-05:00"),
    ],
)
def test_what_makes_no_sense_makes_no_key(file, option, value):
    baton(file, "add", "--tenant", "acme", option, value, code=2)
    assert not file.exists()


@pytest.mark.parametrize("text", ["2027-01-31", "2027-01-31T00:00:00Z", "2027-01-31T01:00+01:00"])
def test_a_date_is_in_utc(file, text):
    baton(file, "add", "--tenant", "acme", "--expires", text)
    assert listed(file)["keys"][0]["expires"] == "2027-01-31T00:00:00Z"
    assert listed(file)["keys"][0]["state"] == "valid"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("0001-01-01", "0001-01-01T00:00:00Z"),
        ("0999-12-31T23:59-00:01", "1000-01-01T00:00:00Z"),
        ("9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59Z"),
    ],
)
def test_the_first_and_the_last_dates_are_dates(file, text, shown):
    baton(file, "add", "--tenant", "acme", "--expires", text)
    assert [key["expires"] for key in listed(file)["keys"]] == [shown]


def test_a_date_that_no_calendar_has_closes_its_own_line_alone(file):
    baton(file, "add", "--tenant", "acme", "--expires", "2027-01-31")
    line = file.read_text()
    broken = line.replace("2027-01-31T00:00:00Z", "9999-12-31T23:59:59-05:00")
    file.write_text(line + "1" * 8 + broken[8:])
    found = listed(file, code=1)
    assert len(found["keys"]) == 1
    assert "line 2: 9999-12-31T23:59:59-05:00 is in no year from 1 to 9999" in found["refused"][0]


def test_a_file_that_anybody_may_write_is_not_written_to(file):
    baton(file, "add", "--tenant", "acme")
    file.chmod(0o606)
    before = file.read_bytes()
    run = CliRunner().invoke(app, ["keys", "add", "--file", str(file), "--tenant", "b"])
    assert "every user of this machine" in str(run.exception) and file.read_bytes() == before


def test_two_who_change_the_file_take_turns(file):
    file.touch(0o640)

    def add(name):
        change_keys(file, lambda lines: [*lines, f"# {name}"])

    threads = [threading.Thread(target=add, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(file.read_text().splitlines()) == sorted(f"# {n}" for n in range(20))
    assert file.stat().st_mode & 0o777 == 0o640 and read_keys(file) == ({}, [])
    assert [p.name for p in file.parent.iterdir()] == ["keys"]


def test_a_change_that_fails_leaves_the_file_as_it_was(file, monkeypatch):
    file.write_text("# one\n")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(ConfigError, match="disk full"):
        change_keys(file, lambda lines: [*lines, "# two"])
    assert file.read_text() == "# one\n" and [p.name for p in file.parent.iterdir()] == ["keys"]
