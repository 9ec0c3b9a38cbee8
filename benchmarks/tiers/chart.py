"""Draws docs/tiers.svg from benchmarks/results/tiers.json, and prints the table of the page.

Owns what of each part is drawn; a part without results is left out. Called by hand.
Run: python -m benchmarks.tiers.chart
"""

import json

from benchmarks.chart import BARE, SERVED, bar, write
from benchmarks.record import RESULTS
from benchmarks.tiers.parts import PARTS

WIDTH = 380


class Chart:
    """Groups of bars, one below the other."""

    def __init__(self):
        self.parts = []
        self.y = 44

    def group(self, title, rows, form, target=None):
        """Rows are (label, value or None, colour); the red line is the target."""
        values = [value or 0.0 for _, value, _ in rows]
        scale = WIDTH / max(*values, target or 0.0, 1e-9)
        self.parts.append(f'<text x="20" y="{self.y - 8}" font-weight="bold">{title}</text>')
        for label, value, colour in rows:
            text = "none" if value is None else form.format(value)
            self.parts.append(bar(self.y, label, value or 0.0, scale, colour, text))
            if target is not None:
                x = f"{160 + target * scale:.0f}"
                ends = f'y1="{self.y - 2}" y2="{self.y + 22}"'
                self.parts.append(f'<line x1="{x}" x2="{x}" {ends} stroke="#c33"/>')
            self.y += 24
        self.y += 34


def draw_fairness(chart, found):
    for name, rows in found["mixes"].items():
        title = f"{name}: share of tokens, of a fair one"
        bars = [
            (tenant, (row["share_of_tokens"] or 0.0) / row["fair_share"], SERVED)
            for tenant, row in rows.items()
        ]
        chart.group(title, bars, "{:.2f}", 1.0)


def draw_quota(chart, found):
    bars = [
        (name, row["most_in_a_window_tokens"], SERVED) for name, row in found["scenarios"].items()
    ]
    chart.group("tokens granted in a minute, both routers", bars, "{:.0f}", found["limit_tokens"])


def draw_preemption(chart, found):
    phases = found["phases"]
    for figure, title in (("ttft_s", "first token"), ("itl_s", "gap between tokens")):
        bars = [
            (f"{label} {at}", 1e3 * phases[name]["interactive"][figure][at], colour)
            for name, label, colour in (
                ("interactive alone", "alone", BARE),
                ("both", "beside batch", SERVED),
            )
            for at in ("p50", "p99")
        ]
        chart.group(f"interactive {title}, decode full of batch work, ms", bars, "{:.1f}")
    bars = [
        ("batch alone", phases["batch alone"]["batch_tokens_per_s"], BARE),
        ("batch, both", phases["both"]["batch_tokens_per_s"], SERVED),
        ("interactive, both", phases["both"]["interactive_tokens_per_s"], SERVED),
    ]
    chart.group("output tokens/s", bars, "{:.0f}")


def draw_burst(chart, found):
    bars = [("batch at 1x", found["attainment"]["calm"], BARE)]
    bars.append(("batch at 10x", found["attainment"]["burst"], SERVED))
    chart.group("interactive requests within their SLO", bars, "{:.1%}")


def draw_attacks(chart, found):
    for row in found["rows"]:
        near = row["beside_ttft_s"]
        bars = [
            ("alone", 1e3 * row["alone_ttft_s"]["p50"], BARE),
            ("beside it", 1e3 * near["p50"] if near else None, SERVED),
        ]
        title = f"a chat's first token beside {row['attack']} of {row['attacker_tier']}, ms (p50)"
        chart.group(title, bars, "{:.0f}", 3 * bars[0][1])


DRAWINGS = {
    "fairness": draw_fairness,
    "quota": draw_quota,
    "preemption": draw_preemption,
    "burst": draw_burst,
    "attacks": draw_attacks,
}


def main():
    result = json.loads((RESULTS / "tiers.json").read_text())
    chart = Chart()
    for name, draw in DRAWINGS.items():
        if name in result:
            draw(chart, result[name])
    machine = result["machine"]
    origin = (
        f"commit {result['commit']}, {machine['cpu']}, {machine['cores']} cores, "
        f"{result['seconds']:g} s of each load; the red line is the target"
    )
    chart.parts.append(f'<text x="20" y="{chart.y - 8}" font-size="11" fill="#667">{origin}</text>')
    write("tiers.svg", chart.y + 6, chart.parts)
    print("| what | figure | target |\n|---|---|---|")
    for name in (name for name in PARTS if name in result):
        for what, figure, target, is_met in PARTS[name].module.lines(result[name]):
            missed = ", **missed**" if is_met is False else ""
            print(f"| {what} | {figure} | {target}{missed} |")


if __name__ == "__main__":
    main()
