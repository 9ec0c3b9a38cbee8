"""Where settings come from: YAML, `BATON_*`, flags; later wins.

Owns the only reading of the environment below the command line, and the words of its errors. Does
not know what a setting means.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from core.config.file import read_file
from core.config.renamed import OnRenamed, log_renamed, with_new_names
from core.config.tree import BatonConfig, known_keys
from core.errors import ConfigError
from core.validation_words import words_of


def from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Read `BATON_ROUTER__HTTP_PORT=8001` as `router.http_port: 8001`."""
    tree: dict[str, Any] = {}
    for name, value in sorted(environment.items()):
        if name.startswith("BATON_"):
            set_key(tree, name.removeprefix("BATON_").lower().replace("__", "."), value)
    return tree


def set_key(tree: dict[str, Any], dotted: str, value: object) -> None:
    """Set one leaf of a nested mapping."""
    *parents, leaf = dotted.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"config key {dotted}: {parent} is a value, not a group")
    tree[leaf] = value


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` on top, group by group."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = (
            merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def load_config(
    path: Path | None = None,
    flags: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
    on_renamed: OnRenamed = log_renamed,
) -> BatonConfig:
    """Build the tree from its sources; what none of them gives has its default.

    Args:
        path: A YAML file.
        flags: Dotted keys and their values.
        environment: Variables; those of this process if not given.
        on_renamed: Called with the old and the new name of each setting that is given by its old
            one.

    Raises:
        ConfigError: Names every wrong key, with the nearest known one.
    """
    given: dict[str, Any] = {}
    for dotted, value in (flags or {}).items():
        set_key(given, dotted, value)
    sources = {
        f"config file {path}": read_file(path) if path is not None else {},
        "the environment": from_environment(os.environ if environment is None else environment),
        "the command line": given,
    }
    tree: dict[str, Any] = {}
    for source, part in sources.items():
        # Source by source: a new name in one overrides the old name in another, as equal names do.
        tree = merge(tree, with_new_names(part, source, on_renamed))
    try:
        return BatonConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def _explain(error: ValidationError) -> str:
    lines = []
    fields = dict(known_keys(BatonConfig))
    keys = list(fields)
    groups = sorted(
        {key.rpartition(".")[0] for key in keys} | {key.partition(".")[0] for key in keys} - {""}
    )
    problems = error.errors()
    wrong = {problem["loc"][:depth] for problem in problems for depth in range(len(problem["loc"]))}
    for problem in problems:
        # Pydantic reports a group and what is wrong in it; the second says more.
        if problem["loc"] and problem["loc"] in wrong:
            continue
        fact = words_of(problem)
        dotted = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(dotted, keys + groups, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            lines.append(f"unknown key {dotted}{hint}")
        else:
            got = f" (got {problem['input']!r})" if _may_show(fields, dotted) else ""
            lines.append(f"{dotted}: {fact}{got}" if dotted else fact)
    return "config is not valid: " + "; ".join(lines)


def _may_show(fields: Mapping[str, FieldInfo], dotted: str) -> bool:
    """Only a setting's value may, or a part of one: a whole group may have a secret in it."""
    return any(info.repr and f"{dotted}.".startswith(f"{key}.") for key, info in fields.items())
