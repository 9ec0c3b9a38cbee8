"""What others install: the wheel, made from the sdist, in an environment without the checkout."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD_SDIST = "from setuptools import build_meta; build_meta.build_sdist({!r})"


def call(*command, cwd=ROOT):
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False, env=outside()
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def outside():
    """The environment of somebody who has no checkout."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"COLUMNS": "200"}


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """What `make dist` makes, in a folder of its own."""
    folder = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-c", BUILD_SDIST.format(str(folder)))
    (sdist,) = folder.glob("*.tar.gz")
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    call(*wheel, "--wheel-dir", str(folder), str(sdist))
    return folder


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory):
    """The wheel in a fresh environment, which borrows our dependencies but not our packages."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    packages = Path(
        call(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = dist.glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    call(*install, "--no-index", str(wheel))
    return folder


def test_the_sdist_and_the_wheel_hold_what_a_cluster_needs_and_no_tests(dist):
    (sdist,) = dist.glob("*.tar.gz")
    (wheel,) = dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        wheeled = set(archive.namelist())
    model = {f"cluster/models/baton-tiny/{p.name}" for p in (ROOT / "models/baton-tiny").iterdir()}
    deploy = {
        f"cluster/{path.relative_to(ROOT)}"
        for path in (ROOT / "deploy").rglob("*")
        if path.is_file()
    }
    code = {
        str(path.relative_to(ROOT))
        for package in {name.partition("/")[0] for name in wheeled if name.endswith(".py")}
        for path in (ROOT / package).rglob("*.py")
    }
    needed = (
        model
        | deploy
        | code
        | {
            "protos/baton/v1/generation.proto",
            "baton/py.typed",
            "client/py.typed",
            "core/py.typed",
            "protos/py.typed",
        }
    )
    assert needed <= wheeled, needed - wheeled
    assert needed <= packed, needed - packed
    assert not {name for name in packed | wheeled if name.startswith("tests")}


@pytest.mark.sampled(2)
@pytest.mark.timeout(600)
def test_the_installed_wheel_starts_generates_and_ends(installed, tmp_path):
    baton = str(installed / "bin" / "baton")
    where = "import cluster, baton; print(cluster.__file__, baton.__version__)"
    path, version = call(str(installed / "bin" / "python"), "-c", where, cwd=tmp_path).split()
    assert Path(path).is_relative_to(installed), "it is the wheel that runs, not the checkout"
    assert version in call(baton, "version", cwd=tmp_path)
    up = subprocess.Popen(
        [baton, "up", "--local", "--http-port", "0", "--grpc-port", "0"],
        cwd=tmp_path,
        env=outside(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said = ""
        for line in up.stdout:
            said += line
            if "try: baton generate" in line:
                break
        http = re.search(r"http://127.0.0.1:(\d+)", said)
        grpc = re.search(r"--grpc (127.0.0.1:\d+)", said)
        assert http and grpc, said
        command = [baton, "generate", "def main(", "--grpc", grpc[1], "--max-tokens", "8"]
        answer = json.loads(call(*command, "-o", "json", cwd=tmp_path))
        assert answer["text"] and int(answer["usage"]["completionTokens"]) == 8
        call(baton, "down", "--http-port", http[1], cwd=tmp_path)
        assert up.wait(timeout=30) == 0
    finally:
        if up.poll() is None:
            up.terminate()
            up.wait(timeout=30)
        up.stdout.close()
