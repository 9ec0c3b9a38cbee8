"""A config file as a plain tree, each key of which stands in it once.

Owns the reading of YAML. Does not know which keys there are.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import ConfigError

if TYPE_CHECKING:
    import yaml


def read_file(path: Path) -> dict[str, Any]:
    """Read a YAML file with the safe loader.

    Raises:
        ConfigError: Not readable, not YAML, not a mapping, or a key stands in it twice.
    """
    import yaml  # noqa: PLC0415 - only the command line reads files; workers skip the import

    try:
        text = path.read_text(encoding="utf-8")
        # Of a string, and not of a stream, the parser's errors would quote lines.
        repeated = _repeated_key(yaml.compose(io.StringIO(text), Loader=yaml.SafeLoader))
        tree = yaml.safe_load(io.StringIO(text))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not YAML: {error}") from error
    if repeated is not None:
        raise ConfigError(
            f"config file {path}, line {repeated.start_mark.line + 1}: the key {repeated.value} "
            "stands in its group a second time; keep one"
        )
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"config file {path} holds a {type(tree).__name__}, must be a mapping of groups"
        )
    return tree


def _repeated_key(root: yaml.Node | None) -> yaml.ScalarNode | None:
    """First key that a YAML mapping has twice; the loader would take the last one silently."""
    import yaml  # noqa: PLC0415

    waiting = [root]
    reached = set()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in reached:
            continue  # an alias may lead back
        reached.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += reversed(node.value)
            continue
        known = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in known:
                    return key
                known.add((key.tag, key.value))
            waiting.append(value)
    return None
