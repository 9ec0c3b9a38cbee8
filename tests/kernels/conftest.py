"""Tests of kernels in Triton's interpreter, on any machine; `make test-kernels` has it."""

import importlib.util
import os

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    # Before anything imports the kernels: they are interpreted from the start or not at all.
    os.environ["TRITON_INTERPRET"] = "1"
