"""Draws docs/measured.svg from benchmarks/results/overhead.json. Run: python -m benchmarks.chart

Owns a bar chart in plain SVG, light enough to read in a diff.
"""

import json
from pathlib import Path

from benchmarks.record import RESULTS

OUT = Path(__file__).parent.parent / "docs" / "measured.svg"
BARE, SERVED = "#8a94a6", "#2f6fde"


def bar(y, label, value, scale, colour, text):
    width = value * scale
    return (
        f'<text x="150" y="{y + 15}" text-anchor="end">{label}</text>'
        f'<rect x="160" y="{y}" width="{width:.1f}" height="20" rx="2" fill="{colour}"/>'
        f'<text x="{168 + width:.1f}" y="{y + 15}">{text}</text>'
    )


def main():
    result = json.loads((RESULTS / "overhead.json").read_text())
    parts, y = [], 44
    for name, title in (("ttft_s", "time to first token, prompt 128"), ("itl_s", "gap between tokens")):
        values = [(kind, result[kind][name]) for kind in ("bare", "served")]
        scale = 380 / max(v["p95"] for _, v in values)
        parts.append(f'<text x="160" y="{y - 8}" font-weight="bold">{title}, ms (p50 and p95)</text>')
        for kind, v in values:
            label, colour = ("bare engine", BARE) if kind == "bare" else ("gRPC door, pd", SERVED)
            parts.append(bar(y, f"{label} p50", v["p50"], scale, colour, f"{v['p50'] * 1e3:.2f}"))
            parts.append(bar(y + 24, "p95", v["p95"], scale, colour, f"{v['p95'] * 1e3:.2f}"))
            y += 54
        y += 30
    origin = f"commit {result['commit']}, {result['machine']['cpu']}, {result['machine']['cores']} cores, {result['turns']} alternating turns"
    parts.append(f'<text x="20" y="{y - 8}" font-size="11" fill="#667">{origin}</text>')
    style = 'font-family="sans-serif" font-size="13"'
    box = f'<rect width="640" height="{y + 6}" fill="white"/>'
    OUT.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{y + 6}" {style}>{box}{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    main()
