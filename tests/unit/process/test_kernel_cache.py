"""Compiled kernels find a folder that may be written, or the start says that there is none."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from core.errors import ConfigError
from process import kernel_cache
from process.kernel_cache import VARIABLE, prepare_kernel_cache

ROOT = Path(__file__).parents[3]


@pytest.fixture()
def place(monkeypatch, tmp_path):
    """A package and a home that nobody may write: files lie where their folders should be."""
    monkeypatch.setattr(kernel_cache.atexit, "register", lambda *_, **__: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(VARIABLE, "")
    for name in ("package", "home"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("name", ["package", "home"])
def test_numba_chooses_itself_where_it_may_write(name, place):
    (place / name).unlink()
    prepare_kernel_cache(place / "package")
    assert os.environ[VARIABLE] == ""


def test_else_it_gets_a_private_folder_that_children_share(place):
    prepare_kernel_cache(place / "package")
    folder = Path(os.environ[VARIABLE])
    assert folder.parent == place
    assert folder.stat().st_mode & 0o777 == 0o700
    prepare_kernel_cache(place / "package")
    assert Path(os.environ[VARIABLE]) == folder


def test_where_nothing_may_be_written_the_start_says_what_to_set(place, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    with pytest.raises(ConfigError, match="NUMBA_CACHE_DIR or TMPDIR"):
        prepare_kernel_cache(place / "package")


def test_an_image_that_cannot_be_written_still_has_its_kernels():
    """In a mount namespace of its own, with this tree read-only and no home."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not make namespaces")
    script = """
        mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && ! touch "$1/x" && cd "$1" &&
        exec "$2" -c 'import os; from kv_transfer import copying, frames
print(os.environ["NUMBA_CACHE_DIR"])'"""
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", str(ROOT), sys.executable],
        env={"HOME": "/proc/nowhere", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folder = done.stdout.strip()
    assert "baton-kernels-" in folder
    assert not Path(folder).exists(), "what was compiled goes with the process"
