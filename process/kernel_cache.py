"""Where compiled kernels are kept when neither the package's folder nor the home can be written.

Owns that choice, told to numba through `NUMBA_CACHE_DIR`, which child processes inherit. Does not
import numba: it reads the variable when it is imported. The folder is this user's alone: what lies
in it is loaded as code.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from core.errors import ConfigError

VARIABLE = "NUMBA_CACHE_DIR"


def prepare_kernel_cache(package_folder: Path) -> None:
    """Leave numba a folder that this user may write; a fresh one goes when this process ends.

    Raises:
        ConfigError: There is none, not even for temporary files.
    """
    if os.environ.get(VARIABLE):
        return
    if _can_be_written(package_folder / "__pycache__") or _can_be_written(_user_folder()):
        return
    try:
        folder = tempfile.mkdtemp(prefix="baton-kernels-")
    except OSError as error:
        raise ConfigError(
            "compiled kernels can be kept nowhere: this user may write neither the installed "
            f"packages, nor its home, nor the folder for temporary files; set {VARIABLE} or TMPDIR "
            "to a folder that it may write"
        ) from error
    os.environ[VARIABLE] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _user_folder() -> Path:
    """Return numba's second choice."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return Path(base) / "numba"


def _can_be_written(folder: Path) -> bool:
    """Try as numba will: permissions alone do not tell of every file system."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True
