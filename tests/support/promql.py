"""Which series PromQL asks for, and whether a scrape has them.

Owns a reader of selectors, groupings and legends: enough to find a name, label or value that does
not exist. Does not know operators, functions, or whether a query makes sense.
"""

import json
import re
from dataclasses import dataclass, field

import yaml
from prometheus_client.parser import text_string_to_metric_families

from support.tree import ROOT

DASHBOARD = ROOT / "deploy" / "grafana" / "baton.json"
PROMETHEUS = ROOT / "deploy" / "prometheus" / "prometheus.yaml"
RULES = ROOT / "deploy" / "prometheus" / "baton.rules.yaml"
PROMETHEUS_LABELS = {"job", "instance"}
"""Put on every series by the scrape itself."""
PROMETHEUS_SERIES = {"up": [{}]}
GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
OTHER_WORDS = {"and", "or", "unless", "bool", "offset"}
TOKEN = re.compile(
    r'"(?:[^"\\]|\\.)*"'  # a string
    r"|[a-zA-Z_:][\w:]*"
    r"|\[[^\]]*\]"  # a range
    r"|=~|!~|!=|[^\s\w]|\d[\w.]*"
)
VARIABLE = re.compile(r'^"\$\w+"$')


@dataclass
class Selector:
    """One vector: `name{label op value, ...}`."""

    name: str
    matchers: list = field(default_factory=list)
    """Label, operator and text, the quotes still around it."""


def read(query):
    """Return a query's selectors, and the labels by which it groups or joins."""
    tokens = TOKEN.findall(query)
    selectors, labels = [], set()
    at = 0
    while at < len(tokens):
        token = tokens[at]
        following = tokens[at + 1] if at + 1 < len(tokens) else ""
        at += 1
        if token in GROUPING and following == "(":
            end = tokens.index(")", at)
            labels |= set(tokens[at + 1 : end]) - {","}
            at = end + 1
        elif token in GROUPING | OTHER_WORDS or not re.match(r"[a-zA-Z_:]", token):
            continue
        # What stands before a parenthesis or a grouping is a function.
        elif following not in ("(", "by", "without"):
            selectors.append(Selector(token))
            if following == "{":
                end = tokens.index("}", at)
                inner = [t for t in tokens[at + 1 : end] if t != ","]
                selectors[-1].matchers = list(zip(*[iter(inner)] * 3, strict=True))
                at = end + 1
    return selectors, labels


def series_of(exposition):
    """Return the labels of every sample by its name, `_bucket` and the like among them."""
    found = {name: list(samples) for name, samples in PROMETHEUS_SERIES.items()}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def missing(query, series, legend=""):
    """List what of a query or its legend no sample has."""
    selectors, labels = read(query)
    found = [s.name for s in selectors if s.name not in series]
    if not selectors:
        found.append(f"no selector in {query}")
    present = [s for s in selectors if s.name in series]
    known = {label for s in present for sample in series[s.name] for label in sample}
    asked = labels | set(re.findall(r"\{\{ ?(\w+) ?\}\}", legend))
    if len(present) == len(selectors):
        found += sorted(asked - known - PROMETHEUS_LABELS)
    for s in present:
        own = [m for m in s.matchers if m[0] not in PROMETHEUS_LABELS]
        found += [
            f"{s.name}{{{''.join(m)}}}" for m in own if not any(_has(x, m) for x in series[s.name])
        ]
        if not any(all(_has(x, m) for m in own) for x in series[s.name]):
            found.append(f"{s.name} with all of {own}")
        found += [f"{s.name}: nothing is {text}" for text in _dead(own, series[s.name])]
    return sorted(set(found))


def _has(labels, matcher):
    """Whether a sample has the label, and the value where one is named."""
    label, operator, text = matcher
    if label not in labels:
        return False
    if VARIABLE.match(text) or operator in ("!=", "!~"):
        return True
    value = json.loads(text)
    return bool(re.fullmatch(value if operator == "=~" else re.escape(value), labels[label]))


def _dead(matchers, samples):
    """Alternatives of a pattern, and excluded values, that no sample has."""
    for label, operator, text in matchers:
        if operator != "=" and not VARIABLE.match(text):
            values = {x.get(label) for x in samples}
            yield from (
                part
                for part in json.loads(text).split("|")
                if not any(value and re.fullmatch(part, value) for value in values)
            )


def panels():
    """Every panel of the dashboard that has queries."""
    return [p for p in json.loads(DASHBOARD.read_text())["panels"] if p["type"] != "row"]


def alerts():
    """Every alert of the rules."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def shown():
    """Every query that is deployed: where it stands, its text, and its legend or summary."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"], target["legendFormat"]
    for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            values = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
            yield f"variable {variable['name']}", values[1], f"{{{{{values[2]}}}}}"
    for alert in alerts():
        summary = alert["annotations"]["summary"]
        yield alert["alert"], alert["expr"], re.sub(r"\$labels\.", "", summary)


def unresolved(exposition):
    """Return what each deployed query asks for in vain."""
    series = series_of(exposition)
    return {
        f"{where}: {query}": lost
        for where, query, legend in shown()
        if (lost := missing(query, series, legend))
    }
