"""The bill of materials: every package that a server of this installation runs, as CycloneDX JSON.

Owns the walk from our own requirements to what is installed, and the document. Does not know the
network: all facts are those of the installed packages. `make sbom` runs it as `python -m cli.sbom`.
"""

from __future__ import annotations

import json
import re
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = "baton-serve"
SPEC_VERSION = "1.6"
MAX_LICENSE_NAME = 80


def needed(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """Yield what an installed package requires here, with some of its extras."""
    environment = {key: str(value) for key, value in default_environment().items()}
    for text in distribution(name).requires or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(
            marker.evaluate({**environment, "extra": extra}) for extra in ("", *extras)
        ):
            yield requirement


def closure(root: str) -> dict[str, list[str]]:
    """Return every installed package that the root needs, and what each needs directly."""
    found: dict[str, set[str]] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(canonical(root), frozenset[str]())]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        direct = found.setdefault(name, set())
        for requirement in needed(name, extras):
            other = canonical(requirement.name)
            if _is_installed(other):
                direct.add(other)
                waiting.append((other, frozenset(requirement.extras)))
    return {name: sorted(direct) for name, direct in found.items()}


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False  # for another platform, or of an extra that is not installed
    return True


def canonical(name: str) -> str:
    """Normalize a package's name as indexes do."""
    return re.sub(r"[-_.]+", "-", name).lower()


def component(name: str) -> dict[str, Any]:
    """Describe one package."""
    package = distribution(name)
    reference = _reference(name)
    return {
        "type": "application" if name == ROOT else "library",
        "bom-ref": reference,
        "name": name,
        "version": package.version,
        "purl": reference,
        **_licenses(package),
    }


def _reference(name: str) -> str:
    # The `+` of a local version (torch's `+cpu`) must be escaped in a URL.
    return f"pkg:pypi/{name}@{distribution(name).version.replace('+', '%2B')}"


def _field(package: Distribution, name: str) -> str:
    return next(iter(package.metadata.get_all(name) or ()), "")


def _licenses(package: Distribution) -> dict[str, Any]:
    expression = _field(package, "License-Expression")
    if expression:
        return {"licenses": [{"expression": expression}]}
    prefix = "License :: "
    classifiers = package.metadata.get_all("Classifier") or []
    names = [c.rpartition(" :: ")[2] for c in classifiers if c.startswith(prefix)]
    free = _field(package, "License")  # some put the whole text there
    if not names and 0 < len(free) <= MAX_LICENSE_NAME and "\n" not in free:
        names = [free]
    return {"licenses": [{"license": {"name": name}} for name in names]} if names else {}


def bill() -> dict[str, Any]:
    """Make the document."""
    tree = closure(ROOT)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
            "component": component(ROOT),
        },
        "components": [component(name) for name in sorted(tree) if name != ROOT],
        "dependencies": [
            {"ref": _reference(name), "dependsOn": [_reference(other) for other in tree[name]]}
            for name in sorted(tree)
        ],
    }


if __name__ == "__main__":
    json.dump(bill(), sys.stdout, indent=1)
