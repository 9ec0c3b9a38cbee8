"""A copy of the tree, to be damaged: what may be broken without breaking the checkout.

Owns what is copied and how. Called by the planted bugs and by mutation testing.
"""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = [
    "core",
    "engine",
    "kv_transfer",
    "worker",
    "prefill_worker",
    "decode_worker",
    "prefix_index",
    "router",
    "cluster",
    "simulation",
    "client",
    "protos",
    "models",
    "tests",
    "pyproject.toml",
]


def copy_tree(folder: Path) -> None:
    """Copy what tests need into an empty folder, without anything compiled."""
    ignored = shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=ignored)
        else:
            shutil.copy(source, folder / part)
