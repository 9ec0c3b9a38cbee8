"""The dashboard and the alerts: whole, explained, and of series that there are.

`tests/e2e/test_dashboards.py` compares them with what a cluster shows.
"""

import json
import re
from collections import Counter
from urllib.parse import urlsplit

import pytest
import yaml
from support.promql import (
    DASHBOARD,
    PROMETHEUS,
    PROMETHEUS_LABELS,
    PROMETHEUS_SERIES,
    RULES,
    alerts,
    missing,
    panels,
    read,
    series_of,
    shown,
)
from support.tree import ROOT

from core import metrics
from core.config import RouterConfig
from router.access.identities import Right
from router.http.app import METRICS_READERS

EXPOSITION = """
# TYPE baton_a_total counter
baton_a_total{tier="gold",result="met"} 1
baton_a_total{tier="batch",result="missed"} 1
# TYPE baton_h histogram
baton_h_bucket{le="1.0",tier="gold"} 1
baton_h_bucket{le="+Inf",tier="gold"} 1
baton_h_sum{tier="gold"} 1
baton_h_count{tier="gold"} 1
# TYPE baton_g gauge
baton_g 3
"""
BY_NAME = {metric.name: metric for metric in metrics.ALL}


@pytest.mark.parametrize(
    ("query", "lost"),
    [
        ('sum by (tier) (rate(baton_a_total{result="met", instance=~"$instance"}[5m]))', []),
        ("histogram_quantile(0.9, sum by (tier, le) (rate(baton_h_bucket[5m])))", []),
        ("baton_h_sum / on (tier) group_left baton_h_count and baton_g > 0", []),
        ('up{job="baton"} == 0 or absent(up{job="baton"})', []),
        ('baton_a_total{result=~"met|missed"} offset 5m', []),
        ('baton_a_total{tier=~"$tier", result!="met"}', []),
        ("rate(baton_b_total[5m])", ["baton_b_total"]),
        ("baton_h", ["baton_h"]),
        ("sum by (role) (baton_a_total)", ["role"]),
        ("sum by (le) (baton_h_count)", ["le"]),
        ('baton_a_total{role="decode"}', ['baton_a_total{role="decode"}']),
        ('baton_a_total{role=~"$role"}', ['baton_a_total{role=~"$role"}']),
        ('baton_a_total{result="lost"}', ['baton_a_total{result="lost"}']),
        ('baton_a_total{result=~"met|lost"}', ["baton_a_total: nothing is lost"]),
        ('baton_a_total{result!="lost"}', ["baton_a_total: nothing is lost"]),
        ('baton_a_total{result="met",tier="batch"}', ["with all of"]),
        ("sum(rate(baton_a_total[5m])) / baton_g > bool 1 unless baton_c", ["baton_c"]),
        ("vector(1)", ["no selector"]),
    ],
)
def test_the_reader_of_queries_finds_what_no_sample_has(query, lost):
    found = missing(query, series_of(EXPOSITION))
    assert len(found) >= len(lost) and bool(found) == bool(lost), found
    assert all(any(part in one for one in found) for part in lost), found


def test_the_reader_of_queries_finds_a_legend_without_its_label():
    assert missing("baton_a_total", series_of(EXPOSITION), "{{tier}} {{ result }}") == []
    assert missing("baton_a_total", series_of(EXPOSITION), "{{role}}") == ["role"]


def test_every_query_names_metrics_of_ours_with_their_labels():
    num_selectors = 0
    for where, query, _ in shown():
        for selector in read(query)[0]:
            if selector.name in PROMETHEUS_SERIES:
                continue
            suffix = re.search(r"_(bucket|sum|count)$", selector.name)
            metric = BY_NAME.get(selector.name[: suffix.start()] if suffix else selector.name)
            assert metric is not None, (where, selector.name)
            assert (metric.kind == "histogram") is bool(suffix), (where, selector.name)
            asked = {label for label, _, _ in selector.matchers}
            assert asked <= {*metric.labels, *PROMETHEUS_LABELS}, (where, asked)
            num_selectors += 1
    assert num_selectors > 70


def test_every_metric_is_on_the_dashboard():
    names = {s.name for panel in panels() for t in panel["targets"] for s in read(t["expr"])[0]}
    for metric in metrics.ALL:
        wanted = f"{metric.name}_bucket" if metric.kind == "histogram" else metric.name
        # Of the phases, the means are shown: they add up, quantiles would not.
        assert {wanted, f"{metric.name}_sum"} & names, metric.name


def test_panels_are_explained_and_lie_side_by_side():
    every = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    taken = Counter()
    for panel in every:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        taken.update(
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        )
    assert set(taken.values()) == {1}
    assert len({panel["title"] for panel in panels()}) == len(panels())
    for panel in panels():
        assert panel["description"].endswith("."), panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]


def section(page, title):
    """A section of a page of the documentation, to the next heading of its rank."""
    text = (ROOT / "docs" / page).read_text().partition(f"\n## {title}\n")[2]
    assert text, title
    return text.partition("\n## ")[0]


def test_every_alert_has_its_words_and_its_section():
    names = [alert["alert"] for alert in alerts()]
    assert len(set(names)) == len(names) > 15
    headings = re.findall(r"^### (\w+)$", section("troubleshooting.md", "An alert fires"), re.M)
    assert headings == names
    for alert in alerts():
        words = alert["annotations"]
        assert words.keys() == {"summary", "description", "runbook_url"}, alert["alert"]
        assert words["description"].endswith("."), alert["alert"]
        link = f"docs/troubleshooting.md#{alert['alert'].lower()}"
        assert words["runbook_url"] == link, alert["alert"]


def test_the_table_of_alerts_says_who_is_woken():
    rows = re.findall(
        r"^\| (`Baton.*?) \| (.*?) \|$", section("operating.md", "Dashboard and alerts"), re.M
    )
    for severity, cells in zip(("page", "ticket"), zip(*rows, strict=True), strict=True):
        listed = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
        of_severity = {a["alert"] for a in alerts() if a["labels"] == {"severity": severity}}
        assert listed == of_severity and listed, severity


def test_the_config_of_prometheus_loads_the_alerts_and_asks_where_routers_tell():
    config = yaml.safe_load(PROMETHEUS.read_text())
    assert [PROMETHEUS.parent / name for name in config["rule_files"]] == [RULES]
    [job] = config["scrape_configs"]
    asked = {
        text
        for alert in alerts()
        for selector in read(alert["expr"])[0]
        for label, _, text in selector.matchers
        if label == "job"
    }
    assert asked == {f'"{job["job_name"]}"'}
    [found] = job["http_sd_configs"]
    place = urlsplit(found["url"])
    default = RouterConfig()
    assert (place.hostname, place.port) == (default.host, default.http_port)
    assert place.path in {path for path, _, right in METRICS_READERS if right is Right.OBSERVE}
