"""Where compiled kernels are kept when neither the package's folder nor the home is writable.

Owns that choice, which numba reads from `NUMBA_CACHE_DIR` and child processes inherit. Does not
import numba: it reads the variable when it is imported. Only this user may write to the folder: its
files are loaded as code.
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
    """Give numba a writable folder; a temporary one is removed when this process ends.

    Raises:
        ConfigError: There is none, not even for temporary files.
    """
    # The operator's choice, or that of a parent which has chosen already.
    if os.environ.get(VARIABLE):
        return
    if _can_be_written(package_folder / "__pycache__") or _can_be_written(_user_folder()):
        return
    try:
        folder = tempfile.mkdtemp(prefix="baton-kernels-")
    except OSError as error:
        raise ConfigError(
            "there is no place for compiled kernels: this user may write neither to the installed "
            f"packages, nor to its home, nor to the temporary folder; set {VARIABLE} or TMPDIR to "
            "a folder that it may write to"
        ) from error
    os.environ[VARIABLE] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _user_folder() -> Path:
    """Return numba's second choice."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return Path(base) / "numba"


def _can_be_written(folder: Path) -> bool:
    """Try it as numba will: on some file systems permissions alone are misleading."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True
