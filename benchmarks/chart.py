"""Draws docs/measured.svg, peers.svg and failover.svg from benchmarks/results. Run: python -m benchmarks.chart

Owns bar charts in plain SVG, light enough to read in a diff.
"""

import json
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
        f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{height}" {style}>{box}{"".join(parts)}</svg>\n'
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
                f'<text x="160" y="{y - 8}" font-weight="bold">{streams} stream{"s" * (streams > 1)}: {title}</text>'
            )
            for r in rows:
                colour = SERVED if r["server"].startswith("baton") else BARE
                parts.append(bar(y, r["server"], r[key], scale, colour, form.format(r[key])))
                y += 24
            y += 30
    origin = f"commit {result['commit']}, {result['machine']['cpu']}, {result['machine']['cores']} cores, {result['model']}"
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
            label, colour = ("bare engine", BARE) if kind == "bare" else ("gRPC door, pd", SERVED)
            parts.append(bar(y, f"{label} p50", v["p50"], scale, colour, f"{v['p50'] * 1e3:.2f}"))
            parts.append(bar(y + 24, "p95", v["p95"], scale, colour, f"{v['p95'] * 1e3:.2f}"))
            y += 54
        y += 30
    origin = f"commit {result['commit']}, {result['machine']['cpu']}, {result['machine']['cores']} cores, {result['turns']} alternating turns"
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
    origin = f"commit {result['commit']}, {machine['cpu']}, {machine['cores']} cores, {result['rounds']} rounds of each"
    parts.append(f'<text x="20" y="{y - 8}" font-size="11" fill="#667">{origin}</text>')
    write("failover.svg", y + 6, parts)


if __name__ == "__main__":
    draw_failover()
    draw_overhead()
    draw_peers()
