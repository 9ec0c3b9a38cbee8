"""Tiers, tenants and quotas of a real cluster: two routers, one Redis, the tiny model.

Owns the command, its progress, its table and the result file. Each part starts clusters of its own.
Called by hand; `benchmarks.tiers.chart` draws docs/tiers.svg.
Run: python -m benchmarks.tiers [PART ...] [--seconds 10] [-o json] [--out NAME]
"""

import argparse
import asyncio
import json
import os

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.record import save
from benchmarks.tiers.parts import PARTS
from core import logs


async def measure(options, progress):
    found = {}
    for name in options.parts:
        module, num_steps = PARTS[name]
        task = progress.add_task(name, total=num_steps)
        begun = 0

        def step(text, task=task):
            nonlocal begun
            progress.update(task, description=text, completed=begun)
            begun += 1
            if not progress.console.is_terminal:  # there bars show nothing until the end
                progress.console.print(text)

        found[name] = await module.measure(step, options.seconds)
        progress.update(task, description=name, completed=num_steps)
    return found


def show(found, console):
    table = Table("", "figure", "target", "met")
    for name, result in found.items():
        table.add_section()
        for what, figure, target, is_met in PARTS[name].module.lines(result):
            table.add_row(what, figure, target, {None: "", True: "yes", False: "NO"}[is_met])
    console.print(table)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; none: all")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    parser.add_argument("--out", default="tiers", help="name of the result file")
    parser.add_argument("--note", default="", help="what else the machine did")
    options = parser.parse_args()
    options.parts = options.parts or list(PARTS)
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    # Faults are part of it: their warnings would hide the progress.
    os.environ.setdefault(logs.LEVEL_VARIABLE, "error")
    console = Console(width=140, stderr=options.output == "json")
    columns = (
        TextColumn("{task.description:60}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        found = asyncio.run(measure(options, progress))
    show(found, console)
    facts = {"note": options.note, "seconds": options.seconds, **found}
    path = save(options.out, facts)
    console.print(str(path))
    if options.output == "json":
        print(json.dumps(json.loads(path.read_text()), indent=2))


if __name__ == "__main__":
    main()
