"""One line a record, whatever it holds; and events are those of the table."""

import ast
import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.tree import PACKAGES

from core import events, logs

ROOT = Path(__file__).parents[3]
FORMATS = {"text": logs.TextFormat, "json": logs.JsonFormat}
FORGED = 'x\n2026-01-01T00:00:00.000+00:00 ERROR   up[1] forged\r\x1b[2J\x85\u2028"y='


def written(style, tell):
    """What a process would write for the records that `tell` makes."""
    lines, formatter = [], FORMATS[style]("router")

    class Taker(logging.Handler):
        def emit(self, record):
            lines.append(formatter.format(record))

    taker, root = Taker(), logging.getLogger()
    root.addHandler(taker)
    level = events.LOGGER.level
    events.LOGGER.setLevel(logging.INFO)
    try:
        tell()
    finally:
        events.LOGGER.setLevel(level)
        root.removeHandler(taker)
    return "\n".join(lines)


def tell_bug():
    try:
        raise ValueError(FORGED)
    except ValueError:
        logging.getLogger("a.bug").exception("a request failed: %s", FORGED)


CLIENTS_WORDS = {
    "an event": lambda: events.REQUEST.log(request_id=FORGED, model="m"),
    "a message": lambda: logging.getLogger("a.library").warning("a client said %s", FORGED),
    "a bug": tell_bug,
}


@pytest.mark.parametrize("what", CLIENTS_WORDS)
@pytest.mark.parametrize("style", FORMATS)
def test_what_a_client_wrote_cannot_make_a_line_of_its_own(style, what):
    text = written(style, CLIENTS_WORDS[what])
    assert text.isascii() and text.replace("\n", "").isprintable() and "forged" in text
    first, *rest = text.split("\n")
    if style == "json":
        assert rest == [] and FORGED in " ".join(map(str, json.loads(first).values()))
    else:
        assert "forged" in first and all(line.startswith("  | ") for line in rest)
        assert bool(rest) is (what == "a bug")


def test_every_line_says_when_how_bad_what_and_who():
    line = json.loads(written("json", lambda: events.STORE_DOWN.log(reason="gone")))
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "warning",
        "event": "store_down",
        "process": "router",
        "pid": os.getpid(),
        "reason": "gone",
    }
    text = written("text", lambda: events.STORE_DOWN.log(reason="is gone", n=3))
    head = f'WARNING router[{os.getpid()}] store_down reason="is gone" n=3'
    assert text.partition(" ")[2] == head


def test_only_a_bug_has_a_traceback_and_is_called_so():
    bug = json.loads(written("json", tell_bug))
    assert (bug["event"], bug["logger"]) == ("bug", "a.bug")
    assert bug["traceback"].startswith("Traceback") and "in tell_bug" in bug["traceback"]
    message = json.loads(written("json", CLIENTS_WORDS["a message"]))
    assert message["event"] == "message" and "traceback" not in message


@pytest.mark.parametrize("style", FORMATS)
def test_keys_and_passwords_stay_out_whoever_puts_them_in(style):
    key, password = "bt-0123abcd-" + "5e" * 16, "s3cret-p4ss"

    def tell():
        events.REQUEST.log(request_id=key, model=f"redis://:{password}@10.0.0.1:6379/0")
        logging.getLogger("x").error("no %s at rediss://user:%s@host", key, password)

    text = written(style, tell)
    assert "5e5e" not in text and password not in text
    assert text.count("bt-0123abcd-***") == 2 and "10.0.0.1:6379/0" in text


class Pipe(io.StringIO):
    """A reader that stands still until it is let go."""

    def __init__(self):
        super().__init__()
        self.is_read = threading.Event()

    def write(self, text):
        assert self.is_read.wait(20)
        return super().write(text)


def test_a_reader_that_stands_still_blocks_nobody_and_hears_how_much_it_missed(monkeypatch):
    monkeypatch.setattr(logs, "MAX_WAITING_LINES", 2)
    pipe = Pipe()
    writer = logs._Writer(logs.JsonFormat("router"), pipe)
    monkeypatch.setattr(events.LOGGER, "handlers", [writer])
    monkeypatch.setattr(events.LOGGER, "level", logging.INFO)
    events.LOGGER.manager._clear_cache()  # type: ignore[attr-defined]
    for _ in range(9):  # one may be in the thread's hand already
        events.STORE_UP.log()
    pipe.is_read.set()
    writer.close()
    lines = [json.loads(line) for line in pipe.getvalue().splitlines()]
    told = [line["event"] for line in lines]
    missed = [line["lines"] for line in lines if line["event"] == "lines_dropped"]
    assert told.count("store_up") + sum(missed) == 9
    assert sum(missed) >= 6
    events.LOGGER.manager._clear_cache()  # type: ignore[attr-defined]


def test_a_full_disk_loses_lines_and_nothing_else(monkeypatch):
    class Disk(Pipe):
        is_full, num_tried = True, 0

        def write(self, text):
            assert self.is_read.wait(20)
            self.num_tried += 1
            if self.is_full:
                raise OSError(28, "No space left on device")
            return super().write(text)

    disk = Disk()
    writer = logs._Writer(logs.JsonFormat("router"), disk)
    monkeypatch.setattr(events.LOGGER, "handlers", [writer])
    for _ in range(3):
        events.STORE_DOWN.log(reason="x")
    disk.is_read.set()
    while disk.num_tried < 3:
        time.sleep(0.001)
    disk.is_full = False
    events.STORE_DOWN.log(reason="x")
    while "lines_dropped" not in disk.getvalue():
        time.sleep(0.001)
    writer.close()
    lines = [json.loads(line) for line in disk.getvalue().splitlines()]
    told = [(line["event"], line.get("lines")) for line in lines]
    assert told == [("store_down", None), ("lines_dropped", 3)], "a lost line makes no lost line"


REENTRANT = """
import logging, sys
from core import logs
logs.configure("up", "json")
log, num_inside, is_inside = logging.getLogger("a"), 0, False
def enter(frame, event, argument):
    global num_inside, is_inside
    if not is_inside:
        is_inside = True
        num_inside += 1
        log.warning("inside")
        is_inside = False
sys.setprofile(enter)
log.warning("outside")
sys.setprofile(None)
print(num_inside)
"""


def test_who_is_about_to_log_may_be_made_to_log_at_every_point_of_it():
    """As the end of a forgotten task is told by the collector of garbage, wherever that runs."""
    done = subprocess.run(
        [sys.executable, "-c", REENTRANT], env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True, text=True, timeout=20, check=True,
    )  # fmt: skip
    told = [json.loads(line)["message"] for line in done.stderr.splitlines()]
    assert told.count("inside") == int(done.stdout) > 20
    assert told.count("outside") == 1


def test_what_cannot_be_shown_is_no_fault_of_who_tells():
    class Broken:
        def __str__(self):
            raise KeyError("x")

    for told, arguments in (("met %s", (Broken(),)), ("met %(name)s", ({"other": 1},))):
        record = logging.LogRecord("a.library", logging.WARNING, "", 0, told, arguments, None)
        assert json.loads(logs.JsonFormat("router").format(record))["message"] == told


SCRIPT = """
import logging, subprocess, sys, threading
from core import events, logs
logs.configure("up", *sys.argv[1:])
events.CLUSTER_STOPS.log()
child = "from core import events, logs; logs.configure('rank'); events.STORE_UP.log(); 1/0"
subprocess.run([sys.executable, "-c", child])
thread = threading.Thread(target=lambda: 1/0, name="worker")
thread.start()
thread.join()
logging.getLogger("httpx").info("every request of a library")
"""


def run_processes(*settings):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *settings],
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stderr.splitlines()


def test_a_process_and_its_children_log_alike_and_end_by_a_bug_in_one_line():
    lines = [json.loads(line) for line in run_processes("auto")]
    told = {(line["process"], line["event"], line.get("message", "")) for line in lines}
    assert len(lines) == 4 and told == {
        ("up", "cluster_stops", ""),
        ("rank", "store_up", ""),
        ("rank", "bug", "the process ends by a bug"),
        ("up", "bug", "thread worker ends by a bug"),
    }
    text = run_processes("text", "error")
    heads = [line.split()[1:4] for line in text if not line.startswith("  | ")]
    told = [(level, process.partition("[")[0], event) for level, process, event in heads]
    assert told == [("CRITICAL", "rank", "bug"), ("ERROR", "up", "bug")]


def calls():
    """Every `events.NAME.log(...)` of the code: name and fields, None for `**`."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr.isupper():
                    owner = getattr(node.value, "id", "")
                    if owner in ("events", "told"):
                        yield path.name, node.attr, None
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "log":
                    name = getattr(getattr(node.func, "value", None), "attr", "")
                    if name.isupper():
                        yield path.name, name, [k.arg for k in node.keywords if k.arg]


def test_every_event_is_told_somewhere_with_the_fields_that_the_table_names():
    by_name = {name: value for name, value in vars(events).items() if value in events.ALL}
    assert len(by_name) == len(events.ALL) == len({e.name for e in events.ALL})
    used = set()
    for path, name, fields in calls():
        used.add(name)
        for field in fields or ():
            assert field in by_name[name].fields, f"{path}: {name} has no field {field}"
    assert used >= set(by_name), set(by_name) - used
    reserved = {"time", "level", "event", "process", "pid"}
    assert not any(reserved & set(e.fields) for e in events.ALL)
