"""The shape of the house: what one request enters, how rooms hang together, how lines look.

Owns the counting of a checkout, this one or another (`--root`), and the tracing of one request
through every process of a local cluster. Does not know what the numbers should be: the aims it
shows are aims.

The import chain counts types too, also those imported under `TYPE_CHECKING`: whoever reads a module
follows its annotations as well. The chain without types leaves out what a module names in
annotations only.

Entered counts as follows. A cluster that has served one request is left alone for some windows of
time, then serves one completion of four tokens in a window of the same length. A function is the
request's if a process called it more often in that window than in any quiet one: so heartbeats,
canaries and mirrors do not count, unless the request uses what they use. Counted are functions of
the product's packages; generated code, libraries, module and class bodies (imports) are not, and a
comprehension or lambda is part of the function that it stands in.
Run: python -m benchmarks.house [--root FOLDER] [--out NAME] [--list]
"""

import argparse
import ast
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
import tomllib
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.record import save

ROOT = Path(__file__).parent.parent
FIELD = "min_p"
"""A sampling field like any other: how many files know it is how many a new one touches."""
AIMS = {"files entered": 45, "functions entered": 300, "import chain": 12, "fmt: skip": 15}
START_S = 120.0
WINDOW_S = 1.5
"""Longer than a heartbeat's period, so that each quiet window sees all that runs by itself."""
NUM_QUIET = 5
"""Quiet windows: the mirror writes every two seconds, and heartbeats jitter."""
WRITE_S = 1.0
"""Time for every process to write what it counted."""
QUIET_ENVIRONMENT = {"BATON_PLACEMENT__PATH": "pd", "BATON_ROUTER__CANARY_INTERVAL_S": "60"}
"""Both workers serve the request, and no canary falls into its window."""
TRACER = """
import collections, json, os, signal, sys, threading
ROOT = os.environ["HOUSE_ROOT"] + "/"
PACKAGES = frozenset(os.environ["HOUSE_PACKAGES"].split(","))
IS_FUNCTION = 1  # CO_OPTIMIZED: bodies of modules and classes are not
entered = collections.Counter()
windows = []

def enter(frame, event, _):
    if event == "call" and frame.f_code.co_flags & IS_FUNCTION:
        code = frame.f_code
        if code.co_filename.startswith(ROOT):
            path = code.co_filename[len(ROOT):]
            if path.partition("/")[0] in PACKAGES:
                entered[path + "::" + code.co_qualname] += 1

def begin(*_):
    entered.clear()

def end(*_):
    windows.append(dict(entered))
    with open(os.environ["HOUSE_OUT"] + f"/{os.getpid()}.json", "w") as out:
        json.dump(windows, out)

if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGUSR1, begin)
    signal.signal(signal.SIGUSR2, end)
    sys.setprofile(enter)
    threading.setprofile(enter)
"""


def packages_of(root: Path) -> list[str]:
    """Product packages: those whose imports are held to contracts, generated code apart."""
    project = tomllib.loads((root / "pyproject.toml").read_text())
    return [p for p in project["tool"]["importlinter"]["root_packages"] if p != "protos"]


def modules_of(root: Path) -> dict[str, Path]:
    """Every product module by its dotted name."""
    found = {}
    for package in packages_of(root):
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports_of(tree: ast.Module, known: Container[str]) -> dict[str, set[str]]:
    """Product modules that a module imports outside functions, each with the names it goes by."""
    blocks = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.If))]
    found: dict[str, set[str]] = defaultdict(set)
    for node in itertools.chain(*blocks):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                module = inside if inside in known else node.module
                found[module].add(alias.asname or alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.name].add(alias.asname or alias.name.partition(".")[0])
    return {module: names for module, names in found.items() if module in known}


def named_at_run_time(node: ast.AST) -> Iterator[str]:
    """Names that code uses outside annotations."""
    if isinstance(node, ast.Name):
        yield node.id
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from named_at_run_time(child)


def longest_chain(modules: dict[str, Path], *, with_types: bool) -> list[str]:
    """Find the longest chain of imports, from the module on top down."""
    graph = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text())
        used = set(named_at_run_time(tree))
        imports = imports_of(tree, modules)
        graph[name] = {m for m, names in imports.items() if with_types or names & used} - {name}

    @cache
    def below(name: str) -> tuple[str, ...]:
        return (name, *max((below(other) for other in sorted(graph[name])), key=len, default=()))

    return list(max((below(name) for name in graph), key=len))


def lines_of(path: Path) -> Counter[str]:
    """Count what the lines of a file are."""
    text = path.read_text()
    counts = Counter(lines=text.count("\n"), longest=max(map(len, text.split("\n")), default=0))
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            counts["comments"] += 1
            counts["fmt: skip"] += "fmt: skip" in token.string
            counts["noqa"] += "noqa" in token.string
        elif token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER):
            code.add(token.start[0])
    counts["code"] = len(code)
    return counts


def count(root: Path) -> dict[str, object]:
    """Count everything that stands still."""
    modules = modules_of(root)
    total: Counter[str] = Counter()
    rooms: Counter[str] = Counter()
    classes = defaultdict(set)
    longest = 0
    for name, path in modules.items():
        counts = lines_of(path)
        longest = max(longest, counts.pop("longest"))
        total += counts
        rooms[".".join(name.split(".")[:-1]) or name] += counts["lines"]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                classes[node.name].add(name)
    known = [*modules.values(), *(root / "protos").rglob("*.proto")]
    chain = longest_chain(modules, with_types=True)
    return {
        "files": len(modules),
        "lines": total["lines"],
        "classes": sum(map(len, classes.values())),
        "import chain": len(chain),
        "import chain without types": len(longest_chain(modules, with_types=False)),
        "chain": chain,
        "fmt: skip": total["fmt: skip"],
        "noqa": total["noqa"],
        "longest line": longest,
        "comments per 100 lines": round(100 * total["comments"] / total["code"], 1),
        f"files that know {FIELD}": sum(
            bool(re.search(rf"\b{FIELD}\b", path.read_text())) for path in known
        ),
        "class names that stand twice": sorted(n for n, where in classes.items() if len(where) > 1),
        "lines per room": dict(rooms.most_common()),
    }


def ask(port: int, path: str, body: dict[str, object] | None = None) -> dict[str, object]:
    """One call of the HTTP endpoint."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


def trace(root: Path) -> dict[str, object]:
    """Serve one completion of four tokens on a local cluster; count what it enters, by process."""
    project = tomllib.loads((root / "pyproject.toml").read_text())
    module, _, function = project["project"]["scripts"]["baton"].partition(":")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(TRACER)
        environment = {
            **os.environ,
            "PYTHONPATH": f"{folder}:{root}",
            "HOUSE_ROOT": str(root),
            "HOUSE_PACKAGES": ",".join(packages_of(root)),
            "HOUSE_OUT": folder,
            **QUIET_ENVIRONMENT,
        }
        log = Path(folder, "up.log")
        start = (
            f"import sys, {module}; "
            "sys.argv = ['baton', 'up', '--local', '--http-port', '0', '--grpc-port', '0']; "
            f"{module}.{function}()"
        )
        with log.open("w") as out:
            up = subprocess.Popen(
                [sys.executable, "-c", start],
                cwd=root,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        try:
            port = wait_ready(up, log)
            body = {"prompt": "def main(argv):\n " * 10, "max_tokens": 4, "temperature": 0}
            ask(port, "/v1/completions", body | {"prompt": "warm " * 40})
            children = [p.pid for p in psutil.Process(up.pid).children(recursive=True)]
            traced = [pid for pid in children if is_python(pid)]
            for _ in range(NUM_QUIET):
                watch(traced, lambda: None)
            watch(traced, lambda: ask(port, "/v1/completions", body))
        finally:
            up.send_signal(signal.SIGTERM)
            up.wait(60)
        processes = [json.loads(p.read_text()) for p in Path(folder).glob("*.json")]
    entered = [of_request(windows) for windows in processes]
    functions = {name for one in entered for name in one}
    files = Counter(name.partition("::")[0] for name in functions)
    rooms: Counter[str] = Counter()
    for file, number in files.items():
        rooms[str(Path(file).parent)] += number
    return {
        "processes": sum(bool(one) for one in entered),
        "files entered": len(files),
        "functions entered": len(functions),
        "calls": sum(sum(one.values()) for one in entered),
        "functions entered per room": dict(rooms.most_common()),
        "entered": sorted(functions),
    }


def watch(pids: list[int], act: Callable[[], object]) -> None:
    """Let processes count their calls for one window, at whose beginning something is done."""
    for pid in pids:
        os.kill(pid, signal.SIGUSR1)
    ends_at = time.monotonic() + WINDOW_S
    act()
    time.sleep(max(0.0, ends_at - time.monotonic()))
    for pid in pids:
        os.kill(pid, signal.SIGUSR2)
    time.sleep(WRITE_S)


def of_request(windows: list[dict[str, int]]) -> Counter[str]:
    """Count the calls of one process that its last window has beyond the quiet ones before it."""
    *quiet, last = [Counter(named(window)) for window in windows]
    most: Counter[str] = Counter()
    for window in quiet:
        most |= window
    return last - most


def named(calls: dict[str, int]) -> dict[str, int]:
    """Leave out comprehensions and lambdas: the function that they stand in counts for them."""
    return {
        name: number for name, number in calls.items() if not re.search(r"<(?!locals>)\w+>", name)
    }


def is_python(pid: int) -> bool:
    """Whether a process runs the tracer."""
    return "python" in psutil.Process(pid).name()


def wait_ready(up: subprocess.Popen[bytes], log: Path) -> int:
    """Wait until the cluster serves; returns its HTTP port."""
    ends_at = time.monotonic() + START_S
    while time.monotonic() < ends_at and up.poll() is None:
        if found := re.search(r"http://[^\s:]+:(\d+)", log.read_text()):
            try:
                ask(int(found[1]), "/ready")
                return int(found[1])
            except OSError:
                pass
        time.sleep(0.2)
    raise SystemExit(f"the cluster did not start:\n{log.read_text()}")


def show(counts: dict[str, Any], console: Console) -> None:
    """Print a line for each number, with its aim."""
    table = Table("what", "count", "aim")
    for name, value in counts.items():
        if isinstance(value, (int, float)):
            table.add_row(name, f"{value:,}", str(AIMS.get(name, "")))
    console.print(table)
    for kind in ("lines per room", "functions entered per room"):
        console.print(kind)
        for room, number in counts[kind].items():
            console.print(f"{number:6,}  {room}", highlight=False)


def main() -> None:
    """Count, trace, show and save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to count")
    parser.add_argument("--list", action="store_true", help="name every function entered")
    parser.add_argument("--out", default="house", help="name under benchmarks/results")
    options = parser.parse_args()
    counts = count(options.root.resolve()) | trace(options.root.resolve())
    show(counts, Console())
    entered = counts.pop("entered")
    if options.list:
        print(*entered, sep="\n")
    print(save(options.out, counts))


if __name__ == "__main__":
    main()
