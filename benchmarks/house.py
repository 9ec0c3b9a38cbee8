"""The shape of the house: what one request enters, how rooms hang together, how lines look.

Owns the counting of a checkout, this one or another (`--root`), and the tracing of one request
through every process of a local cluster. Does not know what the numbers should be; the aims it
shows are those of docs/performance.md.
Run: python -m benchmarks.house [--root FOLDER] [--out NAME]
"""

import argparse
import ast
import io
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
from functools import cache
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.record import save

ROOT = Path(__file__).parent.parent
FIELD = "min_p"
"""A sampling field like any other: how many files know it is how many a new one touches."""
AIMS = {"files entered": 45, "functions entered": 300, "import chain": 12, "fmt: skip": 15}
START_S = 120.0
TRACER = """
import collections, json, os, signal, sys, threading
ROOT = os.environ["HOUSE_ROOT"] + "/"
entered = collections.Counter()

def enter(frame, event, _):
    if event == "call":
        code = frame.f_code
        if code.co_filename.startswith(ROOT) and ".venv" not in code.co_filename:
            entered[code.co_filename[len(ROOT):] + "::" + code.co_qualname] += 1

def begin(*_):
    entered.clear()

def end(*_):
    with open(os.environ["HOUSE_OUT"] + f"/{os.getpid()}.json", "w") as out:
        json.dump(dict(entered), out)

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


def imports_of(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Product modules that a module imports as it is loaded; imports inside functions wait."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & known.keys()
            found |= inside or ({node.module} & known.keys())
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known.keys()
    return found - {name}


def longest_chain(modules: dict[str, Path]) -> list[str]:
    """Find the longest chain of imports, from the module on top down."""
    graph = {name: imports_of(name, path, modules) for name, path in modules.items()}

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
    chain = longest_chain(modules)
    return {
        "files": len(modules),
        "lines": total["lines"],
        "classes": sum(map(len, classes.values())),
        "import chain": len(chain),
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
    headers = {"content-type": "application/json", "x-baton-timing": "1"}
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
            "HOUSE_OUT": folder,
            "BATON_PLACEMENT__PATH": "pd",
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
            for pid in traced:
                os.kill(pid, signal.SIGUSR1)
            time.sleep(0.2)
            ask(port, "/v1/completions", body)
            for pid in traced:
                os.kill(pid, signal.SIGUSR2)
            time.sleep(2.0)
        finally:
            up.send_signal(signal.SIGTERM)
            up.wait(60)
        entered = [json.loads(p.read_text()) for p in Path(folder).glob("*.json")]
    functions = {name for one in entered for name in one}
    return {
        "processes": sum(bool(one) for one in entered),
        "files entered": len({name.partition("::")[0] for name in functions}),
        "functions entered": len(functions),
        "calls": sum(sum(one.values()) for one in entered),
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


def show(counts: dict[str, object], console: Console) -> None:
    """Print a line for each number, with its aim."""
    table = Table("what", "count", "aim")
    for name, value in counts.items():
        if isinstance(value, (int, float)):
            table.add_row(name, f"{value:,}", str(AIMS.get(name, "")))
    console.print(table)
    for room, lines in counts["lines per room"].items():
        console.print(f"{lines:6,}  {room}", highlight=False)


def main() -> None:
    """Count, trace, show and save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to count")
    parser.add_argument("--out", default="house", help="name under benchmarks/results")
    options = parser.parse_args()
    counts = count(options.root.resolve()) | trace(options.root.resolve())
    show(counts, Console())
    print(save(options.out, counts))


if __name__ == "__main__":
    main()
