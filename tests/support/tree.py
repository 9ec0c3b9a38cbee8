"""The tree: its packages, and a copy of it that may be damaged without breaking the checkout.

Owns the list of packages, what is copied and how.
"""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = [
    "core",
    "process",
    "transport",
    "prefix_index",
    "engine",
    "kv_transfer",
    "kv_storage",
    "worker",
    "prefill_worker",
    "decode_worker",
    "router",
    "cluster",
    "simulation",
    "client",
    "baton",
    "bench",
    "cli",
]
"""Where product code is."""
PARTS = [*PACKAGES, "protos", "docs", "examples", "models", "deploy", "tests", "pyproject.toml"]


def copy_tree(folder: Path) -> None:
    """Copy what tests need into an empty folder, without anything compiled."""
    ignored = shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=ignored)
        else:
            shutil.copy(source, folder / part)
