"""Draws the pictures of docs/ from benchmarks/results. Run: python -m benchmarks.chart

Owns bar and curve charts in plain SVG, light enough to read in a diff: measured, peers, failover,
scaling, overload. Called by hand after a benchmark; one without results is left as it is.
"""

import json
import math
from pathlib import Path

from benchmarks.record import RESULTS

DOCS = Path(__file__).parent.parent / "docs"
BARE, SERVED = "#8a94a6", "#2f6fde"


def bar(y, label, value, scale, colour, text):
    width = value * scale
    return (
        f'<text x="150" y="{y + 15}" text-anchor="end">{label}</text>'
        f'<rect x="160" y="{y}" width="{width:.1f}" height="20" rx="2" fill="{colour}"/>'
        f'<text x="{168 + width:.1f}" y="{y + 15}">{text}</text>'
    )


def write(name, height, parts):
    style = 'font-family="sans-serif" font-size="13"'
    box = f'<rect width="640" height="{height}" fill="white"/>'
    (DOCS / name).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{height}" '
        f"{style}>{box}{''.join(parts)}</svg>\n"
    )


def draw_peers():
    """Tokens per second and TTFT beside other servers, medians over alternating turns."""
    result = json.loads((RESULTS / "peers.json").read_text())
    parts, y = [], 44
    for streams in (1, 8):
        for key, title, form in (
            ("tokens_per_s", "output tokens/s (more is better)", "{:.0f}"),
            ("ttft_p50_ms", "TTFT p50, ms (less is better)", "{:.1f}"),
        ):
            rows = [r for r in result["rows"] if r["streams"] == streams]
            scale = 380 / max(r[key] for r in rows)
            parts.append(
                f'<text x="160" y="{y - 8}" font-weight="bold">{streams} '
                f"stream{'s' * (streams > 1)}: {title}</text>"
            )
            for r in rows:
                colour = SERVED if r["server"].startswith("baton") else BARE
                parts.append(bar(y, r["server"], r[key], scale, colour, form.format(r[key])))
                y += 24
            y += 30
    origin = (
        f"commit {result['commit']}, {result['machine']['cpu']}, "
        f"{result['machine']['cores']} cores, {result['model']}"
    )
    parts.append(f'<text x="20" y="{y - 8}" font-size="11" fill="#667">{origin}</text>')
    write("peers.svg", y + 6, parts)


def draw_overhead():
    result = json.loads((RESULTS / "overhead.json").read_text())
    parts, y = [], 44
    for name, title in (
        ("ttft_s", "time to first token, prompt 128"),
        ("itl_s", "gap between tokens"),
    ):
        values = [(kind, result[kind][name]) for kind in ("bare", "served")]
        scale = 380 / max(v["p95"] for _, v in values)
        parts.append(
            f'<text x="160" y="{y - 8}" font-weight="bold">{title}, ms (p50 and p95)</text>'
        )
        for kind, v in values:
            label, colour = ("bare engine", BARE) if kind == "bare" else ("gRPC server, pd", SERVED)
            parts.append(bar(y, f"{label} p50", v["p50"], scale, colour, f"{v['p50'] * 1e3:.2f}"))
            parts.append(bar(y + 24, "p95", v["p95"], scale, colour, f"{v['p95'] * 1e3:.2f}"))
            y += 54
        y += 30
    origin = (
        f"commit {result['commit']}, {result['machine']['cpu']}, "
        f"{result['machine']['cores']} cores, {result['turns']} alternating turns"
    )
    parts.append(f'<text x="20" y="{y - 8}" font-size="11" fill="#667">{origin}</text>')
    write("measured.svg", y + 6, parts)


def draw_failover():
    """Longest wait of affected clients by fault and load, p99 beside the aim."""
    result = json.loads((RESULTS / "failover.json").read_text())
    parts, y = [], 44
    scale = 380 / max(4.0, *(r["p99"] for r in result["rows"]))
    for streams in sorted({r["streams"] for r in result["rows"]}):
        title = (
            f"{streams} streams: longest wait of an affected client, s (p99; the line is the aim)"
        )
        parts.append(f'<text x="20" y="{y - 8}" font-weight="bold">{title}</text>')
        for r in (r for r in result["rows"] if r["streams"] == streams):
            colour = BARE if r["fault"] == "none" else SERVED
            parts.append(bar(y, r["fault"], r["p99"], scale, colour, f"{r['p99']:.2f}"))
            if r["aim_p99_s"]:
                x = 160 + r["aim_p99_s"] * scale
                parts.append(
                    f'<line x1="{x:.0f}" y1="{y - 2}" x2="{x:.0f}" y2="{y + 22}" stroke="#c33"/>'
                )
            y += 24
        y += 34
    machine = result["machine"]
    origin = (
        f"commit {result['commit']}, {machine['cpu']}, {machine['cores']} cores, "
        f"{result['rounds']} rounds of each"
    )
    parts.append(f'<text x="20" y="{y - 8}" font-size="11" fill="#667">{origin}</text>')
    write("failover.svg", y + 6, parts)


PANELS = (
    ("router, ms by workers", "ms", ("placement", "introduce_one", "introduce_all")),
    (
        "scheduler step, ms by waiting requests",
        "ms",
        ("step_handovers_waiting", "step_prompts_waiting", "num_waiting_tokens"),
    ),
    (
        "decode step, plan and pack, ms by context",
        "ms",
        ("decode_plain", "decode_repetition", "decode_frequency"),
    ),
    (
        "decode step, bytes to a rank by context",
        "bytes",
        ("decode_plain_bytes", "decode_repetition_bytes", "decode_frequency_bytes"),
    ),
    ("frequency penalty, ms by output", "ms", ("frequency_by_output",)),
    ("block pool, bytes a cached block", "bytes", ("bytes_a_cached_block",)),
    ("block pool, ms by cached blocks", "ms", ("drop_cache", "evict_100", "allocate_free_100")),
)
HUES = ("#2f6fde", "#d9822b", "#3a9b6f")
PANEL_WIDTH, PANEL_HEIGHT = 300, 190


class LogScale:
    """Values of one axis, in pixels; whole decades around them."""

    def __init__(self, values, low, high):
        self.first = math.floor(math.log10(min(values)))
        self.last = max(math.ceil(math.log10(max(values))), self.first + 1)
        self._low, self._high = low, high

    def at(self, value):
        share = (math.log10(value) - self.first) / (self.last - self.first)
        return self._low + share * (self._high - self._low)

    def decades(self):
        return [10.0**power for power in range(self.first, self.last + 1)]


def short(value):
    """10000 as 10k."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"


def curve(rows, across, up, hue, is_before):
    """Medians of one curve: before thin and dashed, now thick with points."""
    points = [(across.at(row["size"]), up.at(row["median"])) for row in rows]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    look = 'stroke-width="1.2" stroke-dasharray="4 3"' if is_before else 'stroke-width="2"'
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{hue}"/>' for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{hue}" {look}/>{dots}'


def panel(left, top, title, names, found, aim):
    """One log-log picture with its axes, both generations of its curves and the aim."""
    kept = [(is_before, i, rows[name]) for is_before, rows in found for i, name in enumerate(names)
            if name in rows]  # fmt: skip
    points = [row for _, _, rows in kept for row in rows]
    medians = [row["median"] for row in points] + ([aim] if aim else [])
    across = LogScale([row["size"] for row in points], left + 46, left + PANEL_WIDTH - 12)
    up = LogScale(medians, top + PANEL_HEIGHT - 18, top + 30)
    right, bottom = left + PANEL_WIDTH - 12, top + PANEL_HEIGHT - 18
    parts = [f'<text x="{left + 6}" y="{top + 14}" font-weight="bold">{title}</text>']
    for value in up.decades():
        y = up.at(value)
        parts.append(
            f'<line x1="{left + 46}" y1="{y:.0f}" x2="{right}" y2="{y:.0f}" stroke="#eee"/>'
        )
        parts.append(
            f'<text x="{left + 42}" y="{y + 4:.0f}" text-anchor="end">{short(value)}</text>'
        )
    for value in across.decades():
        x = across.at(value)
        parts.append(
            f'<text x="{x:.0f}" y="{bottom + 14}" text-anchor="middle">{short(value)}</text>'
        )
    if aim:
        y = up.at(aim)
        parts.append(
            f'<line x1="{left + 46}" y1="{y:.0f}" x2="{right}" y2="{y:.0f}" stroke="#c33"/>'
        )
    parts += [curve(rows, across, up, HUES[i], is_before=is_before) for is_before, i, rows in kept]
    for i, name in enumerate(names):
        label = f'<text x="{left + 52}" y="{top + 28 + 12 * i}" fill="{HUES[i]}">{name}</text>'
        parts.append(label)
    return "".join(parts)


def draw_scaling():
    """Cost by size, before (dashed) and now, log-log; the red line is the aim."""
    results = [(name == "scaling_before", json.loads(path.read_text()))
               for name in ("scaling_before", "scaling")
               if (path := RESULTS / f"{name}.json").exists()]  # fmt: skip
    if not results:
        return
    found = [(is_before, result["curves"]) for is_before, result in results]
    aims = results[-1][1]["aims"]
    parts = []
    for i, (title, _, names) in enumerate(PANELS):
        aim = next((aims[n]["at_most"] for n in names if aims[n]["at_most"]), None)
        left, top = 20 + (i % 2) * PANEL_WIDTH, 8 + (i // 2) * (PANEL_HEIGHT + 10)
        parts.append(panel(left, top, title, names, found, aim))
    y = 8 + -(-len(PANELS) // 2) * (PANEL_HEIGHT + 10) + 14
    for is_before, result in results:
        look = "before, dashed" if is_before else "now"
        origin = f"{look}: commit {result['commit']}, {result['machine']['cpu']}, one core"
        parts.append(f'<text x="20" y="{y}" fill="#667">{origin}; the red line is the aim</text>')
        y += 16
    write("scaling.svg", y, ['<g font-size="10">', *parts, "</g>"])


def draw_prefixes():
    """Token hit rate by the size of the workers' caches, beside the ideal shared cache (red)."""
    parts = []
    y = 44
    for name in ("conversation", "synthetic"):
        path = RESULTS / f"trace_{name}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        rows = result["by_cache_size"]
        ideal = rows[0]["ideal_token_hit_rate"]
        scale = 380 / ideal
        title = f"{name}: share of prompt tokens found in caches; ideal {ideal:.1%}"
        parts.append(f'<text x="20" y="{y - 8}" font-weight="bold">{title}</text>')
        for row in rows:
            rate = row["token_hit_rate"]
            label = f"{short(row['cache_tokens'])} a worker"
            parts.append(bar(y, label, rate, scale, SERVED, f"{rate:.1%}"))
            y += 24
        for row in result["policies"][1:]:
            rate = row["token_hit_rate"]
            label = f"3M {row['policy']}"
            parts.append(bar(y, label, rate, scale, BARE, f"{rate:.1%}"))
            y += 24
        x = f"{160 + ideal * scale:.0f}"
        top = y - 24 * (len(rows) + len(result["policies"]) - 1) - 2
        parts.append(f'<line x1="{x}" x2="{x}" y1="{top}" y2="{y}" stroke="#c33"/>')
        parts.append(
            f'<text x="20" y="{y + 14}" font-size="11" fill="#667">{result["workers"]} workers, '
            f"{result['requests']} requests, commit {result['commit']}</text>"
        )
        y += 60
    if parts:
        write("prefixes.svg", y - 30, parts)


def draw_conversation():
    """Time to the first token by turn of a chat, with prefixes kept and without."""
    path = RESULTS / "conversation.json"
    if not path.exists():
        return
    result = json.loads(path.read_text())
    rows = result["by_turn"]
    kinds = (("without", BARE, "computed anew"), ("with", SERVED, "prefix kept"))
    most = max(row[f"{kind}_ttft_s"]["p50"] for row in rows for kind, _, _ in kinds)
    title = "time to the first token, ms (median), by turn of a chat"
    parts = [f'<text x="60" y="26" font-weight="bold">{title}</text>']
    for kind, colour, label in kinds:
        at = [
            (60 + 520 * (row["turn"] - 1) / max(1, len(rows) - 1),
             250 - 190 * row[f"{kind}_ttft_s"]["p50"] / most)
            for row in rows
        ]  # fmt: skip
        line = " ".join(f"{x:.0f},{y:.0f}" for x, y in at)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), row in zip(at, rows, strict=True):
            value = row[f"{kind}_ttft_s"]["p50"] * 1e3
            parts.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3" fill="{colour}"/>')
            # Below its point where the two lines may meet; the axis has no room below it.
            label_y = y + 16 if kind == "with" and y < 200 else y - 8
            parts.append(
                f'<text x="{x:.0f}" y="{label_y:.0f}" font-size="11" text-anchor="middle" '
                f'fill="{colour}">{value:.0f}</text>'
            )
        x, y = at[-1]
        parts.append(
            f'<text x="{x:.0f}" y="{y - 24:.0f}" text-anchor="end" fill="{colour}">{label}</text>'
        )
    for row in rows:
        x = 60 + 520 * (row["turn"] - 1) / max(1, len(rows) - 1)
        parts.append(
            f'<text x="{x:.0f}" y="268" font-size="11" text-anchor="middle">{row["turn"]}</text>'
        )
    parts.append('<line x1="60" y1="250" x2="590" y2="250" stroke="#99a"/>')
    machine = result["machine"]
    parts.append(
        f'<text x="60" y="292" font-size="11" fill="#667">{rows[0]["prompt_tokens"]} tokens in '
        f"turn 1, {result['model']}, {result['workers']}, {machine['cpu']}, commit "
        f"{result['commit']}</text>"
    )
    write("conversation.svg", 304, parts)


def draw_overload():
    """Goodput, refusals, stalls and recovery by load, beside the aims."""
    path = RESULTS / "overload.json"
    if not path.exists():
        return
    result = json.loads(path.read_text())
    lines = (
        ("goodput of capacity (within the limit to the first token)",
         lambda r: r["within_slo_per_s_of_capacity"], "{:.0%}", result["aims"]["goodput"]),
        ("refusal p99 from when it was possible, s",
         lambda r: (r["refusal_s"] or {}).get("p99"), "{:.3f}", result["aims"]["refusal_p99_s"]),
        ("longest stall in mid-answer, s", lambda r: r["longest_stall_s"], "{:.2f}", None),
        ("recovery after the end, s", lambda r: r["recovery_s"], "{:.2f}",
         result["aims"]["recovery_s"]),
    )  # fmt: skip
    parts, y = [], 44
    for title, read, form, aim in lines:
        rows = [(row, read(row)) for row in result["rows"]]
        scale = 380 / max([aim or 0.0, *(value or 0.0 for _, value in rows), 1e-9])
        parts.append(f'<text x="20" y="{y - 8}" font-weight="bold">{title}</text>')
        for row, value in rows:
            text = "none" if value is None else form.format(value)
            parts.append(bar(y, f"{row['times']:g}x", value or 0.0, scale, SERVED, text))
            if aim:
                x = f"{160 + aim * scale:.0f}"
                ends = f'y1="{y - 2}" y2="{y + 22}"'
                parts.append(f'<line x1="{x}" x2="{x}" {ends} stroke="#c33"/>')
            y += 24
        y += 34
    machine = result["machine"]
    origin = (
        f"commit {result['commit']}, {machine['cpu']}, {machine['cores']} cores, "
        f"{result['settings']['seconds']:g} s of each; the red line is the aim"
    )
    parts.append(f'<text x="20" y="{y - 8}" font-size="11" fill="#667">{origin}</text>')
    write("overload.svg", y + 6, parts)


if __name__ == "__main__":
    draw_failover()
    draw_overhead()
    draw_peers()
    draw_scaling()
    draw_overload()
    draw_prefixes()
    draw_conversation()
