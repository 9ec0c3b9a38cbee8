"""The rules that a linter cannot see, and the promises documents make."""

import ast
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support.tree import PACKAGES

from benchmarks.house import imports_of, longest_chain, of_request
from cli.sbom import bill, canonical
from core import metrics
from router import refusals

ROOT = Path(__file__).parents[2]


def test_every_module_opens_with_what_it_owns():
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            doc = re.match(r'"""(.*?)"""', path.read_text(), re.S)
            assert doc, path
            words = doc[1].lower()
            assert "owns" in words, path


def test_no_file_is_longer_than_a_room():
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 400, path


def test_no_file_of_tests_is_longer_than_one_of_the_product():
    for path in (ROOT / "tests").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path.relative_to(ROOT)


def test_no_two_classes_have_one_name():
    """Whoever searches for one finds one thing; generated code has names of its own."""
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    names = re.findall(r"^class (\w+)", "\n".join(p.read_text() for p in paths), re.MULTILINE)
    assert len(names) > 400
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_unit_tests_stand_where_their_module_does():
    """`unit/router/test_placement.py` is about `router/placement.py`; an aspect may follow."""
    unit = ROOT / "tests" / "unit"
    paths = sorted(unit.rglob("test_*.py"))
    assert len(paths) > 50
    for path in paths:
        room = ROOT / path.parent.relative_to(unit)
        words = path.stem.split("_")[1:]
        subjects = {"_".join(words[:count]) for count in range(1, len(words) + 1)}
        modules = {module.stem for module in room.glob("*.py")}
        packages = {inner.parent.name for inner in room.glob("*/__init__.py")}
        assert path.parent != unit and subjects & (modules | packages), path.relative_to(ROOT)


def test_coverage_is_counted_over_every_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["coverage"]["run"]["source"] == PACKAGES


def test_nobody_else_installs_packages_of_our_names():
    owners = importlib.metadata.packages_distributions()
    for package in (*PACKAGES, "protos"):
        assert set(owners.get(package, ["baton-serve"])) == {"baton-serve"}, package


@pytest.mark.parametrize("failing", ["", "faults", "e2e", "component", "simulation"])
def test_make_test_runs_all_parts_and_fails_when_one_fails(failing, tmp_path):
    """With a python that only notes what it is to run, and fails on one part."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"""#!/bin/sh
echo "$*" >> {tmp_path}/ran
case "$*" in *tests/{failing or "nothing"}*) exit 1;; esac
""")
    python.chmod(0o755)
    (tmp_path / ".ready").touch()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(
        ["make", "test", f"VENV={tmp_path}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        check=False,
    )
    assert (done.returncode == 0) is (failing == ""), done
    assert len((tmp_path / "ran").read_text().splitlines()) == 4


def test_links_in_documents_exist():
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
            if not target.startswith(("http://", "https://", "mailto:")):
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_paths_named_in_request_life_exist():
    text = (ROOT / "docs" / "request-life.md").read_text()
    named = set(re.findall(r"`([a-z_]+/[a-z_/]+\.(?:py|proto))`", text))
    assert len(named) >= 12
    for path in named:
        assert (ROOT / path).exists(), path


def test_make_test_is_the_readmes_test_command_and_ci_runs_both():
    assert "make test" in (ROOT / "README.md").read_text()
    script = (ROOT / ".ci" / "run").read_text()
    assert "make check" in script and "make test" in script


def test_make_test_and_make_test_long_run_every_folder_of_tests():
    recipes = dict(
        re.findall(r"^(test[a-z-]*):.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    )
    runs = ("test-processes", "test-rest", "test-virtual")
    assert set(runs) <= set(recipes["test"].split())
    tests = [p.relative_to(ROOT / "tests") for p in (ROOT / "tests").rglob("test_*.py")]
    folders = {f"tests/{path.parts[0]}" for path in tests}
    for parts in ("".join(recipes[run] for run in runs), recipes["test-long"]):
        assert folders == set(re.findall(r"tests/\w+", parts))


def test_every_dependency_has_its_line():
    text = (ROOT / "docs" / "dependencies.md").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    names = re.findall(
        r'^  "([a-zA-Z0-9_.\[\]-]+?)(?:[=<>].*)?",$', project.split("[tool.setuptools")[0], re.M
    )
    assert len(names) > 20
    for name in names:
        assert f"`{name}`" in text, name


def test_workers_and_routers_never_import_torch():
    code = (
        "import sys, cluster.worker_process, cluster.router_process, router.http.app; "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_drawings_of_the_rooms_are_the_linters_layers():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = project["tool"]["importlinter"]["contracts"]
    layers = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = text.partition("\n## Rooms")[2].partition("\n## ")[0]
    drawings = re.findall(r"```\n(.*?)```", rooms, re.S)
    assert [[line.strip().split("  ")[0] for line in d.splitlines()] for d in drawings] == layers


def test_the_table_of_heavy_libraries_names_who_imports_them_and_nobody_else():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(torch|ray|redis|grpc)` \|(.*)\|$", text, re.M)
    assert len(rows) == 4
    for library, cell in rows:
        told = tuple(f"{room}." for room in re.findall(r"`([a-z_.]+)`", cell))
        found = set()
        for package in PACKAGES:
            for path in (ROOT / package).rglob("*.py"):
                if re.search(rf"^ *(?:import|from) {library}\b", path.read_text(), re.M):
                    module = ".".join(path.relative_to(ROOT).with_suffix("").parts) + "."
                    found |= {room for room in told if module.startswith(room)} or {module}
        assert found == set(told), library


def words_to_avoid():
    """First column of the glossary's second table."""
    text = (ROOT / "docs" / "glossary.md").read_text().partition("## Words to avoid")[2]
    cells = re.findall(r"^\| ([a-z, ]+) \|", text, re.M)
    return {word.strip() for cell in cells for word in cell.split(",")} - {"do not say"}


def words_of(name):
    """`retry_budget` and `RetryBudget` are both retry and budget."""
    return {w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


GIVEN = {"_timer_handle_cancelled"}
"""Names of a library's hooks, which are not ours to choose."""


def test_glossary_words_to_avoid_are_avoided():
    avoided = words_to_avoid()
    assert len(avoided) > 20 and {"wish", "meet", "helper", "carrier"} <= avoided
    assert words_of("WishMaker") & avoided and words_of("_meet_peer") & avoided
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, kinds) and node.name not in GIVEN:
                    wrong = words_of(node.name) & avoided
                    assert not wrong, f"{path.name}: {node.name} has {wrong}"


def test_recorded_results_carry_commit_machine_and_command():
    results = list((ROOT / "benchmarks" / "results").glob("*.json"))
    assert results
    for path in results:
        recorded = set(json.loads(path.read_text()))
        assert {"commit", "command"} <= recorded, path.name
        # As `baton bench` says it, with the versions of all packages.
        assert recorded & {"machine", "environment"}, path.name


def test_the_reference_is_what_the_code_says():
    from cli.reference import OUT, render

    assert OUT.read_text() == render(), "docs/reference.md drifted; run make reference"


def test_the_servers_refuse_with_codes_of_the_reference():
    """No server has codes of its own: each is in the tree of errors or in the table."""
    refuse = {"refuse", "note", "_refuse", "_note_fault", "_on_refused", "plain_error"}
    refuse.add("plain_body")
    num_calls = 0
    for path in (ROOT / "router").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in refuse:
                num_calls += 1
                texts = {a.value for a in node.args if isinstance(a, ast.Constant)}
                words = {w for w in texts if isinstance(w, str) and re.fullmatch("[a-z_]+", w)}
                assert words <= set(metrics.OUTCOMES), f"{path.name}, line {node.lineno}: {words}"
    assert num_calls > 20
    kinds = [kind for kind in vars(refusals).values() if isinstance(kind, refusals.Refusal)]
    assert len({kind.code for kind in kinds}) == len(kinds) == len(refusals.ALL) >= 10
    reference = (ROOT / "docs" / "reference.md").read_text()
    for code in refusals.CODES | {kind.code for kind in kinds}:
        assert f"| `{code}` |" in reference, code


def test_generated_protos_are_those_of_the_proto_files(tmp_path):
    protos = [str(p.relative_to(ROOT)) for p in (ROOT / "protos").rglob("*.proto")]
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        "-I",
        ".",
        f"--python_out={tmp_path}",
        f"--grpc_python_out={tmp_path}",
        *protos,
    ]
    subprocess.run(command, check=True, cwd=ROOT)
    fresh = list(tmp_path.rglob("*.py"))
    assert len(fresh) == 4
    for path in fresh:
        assert path.read_text() == (ROOT / path.relative_to(tmp_path)).read_text(), (
            f"{path.name} drifted; run make protos"
        )


def pins():
    """Lines of the lock: package to (version, hashes)."""
    files = [ROOT / name for name in ("constraints.txt", "constraints-dev.txt")]
    text = "".join(path.read_text() for path in files).replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    found = {}
    for pin, *hashes in lines:
        name, _, number = pin.partition("==")
        found[canonical(name.partition("[")[0])] = number, hashes
    return found


def test_what_is_installed_is_pinned_by_version_and_hash():
    locked = pins()
    assert len(locked) > 100 and all(
        number and hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", h) for h in hashes)
        for number, hashes in locked.values()
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + project["build-system"]["requires"]
    for text in [*wanted, *project["project"]["optional-dependencies"]["dev"]]:
        wish = Requirement(text)
        if wish.name != "torch":
            assert wish.specifier.contains(locked[canonical(wish.name)][0]), text
    recipe = (ROOT / "Makefile").read_text()
    assert "--require-hashes --requirement constraints.txt" in recipe
    assert "--no-deps --no-build-isolation --editable" in recipe


def test_the_bill_of_materials_has_all_that_a_server_runs_and_who_needs_it():
    made = bill()
    assert (made["bomFormat"], made["specVersion"]) == ("CycloneDX", "1.6")
    parts = {part["name"]: part for part in made["components"]}
    for name in ("torch", "grpcio", "ray", "redis", "uvicorn", "pydantic-core"):
        installed = importlib.metadata.version(name)
        assert parts[name]["version"] == installed
        assert parts[name]["purl"] == f"pkg:pypi/{name}@{installed.replace('+', '%2B')}"
    assert not {"pytest", "mypy", "ruff", "baton-serve"} & set(parts), "for development, or itself"
    references = {part["bom-ref"] for part in [*parts.values(), made["metadata"]["component"]]}
    edges = {edge["ref"]: edge["dependsOn"] for edge in made["dependencies"]}
    assert set(edges) == references
    assert {one for needs in edges.values() for one in needs} <= references
    assert parts["pydantic-core"]["purl"] in edges[parts["pydantic"]["purl"]]


def test_a_sampling_field_is_named_in_five_files():
    """`CONTRIBUTING.md` names them: what it is, both APIs, the session, what it does."""
    files = [
        path
        for package in (*PACKAGES, "protos")
        for kind in ("*.py", "*.proto")
        for path in (ROOT / package).rglob(kind)
        if not path.name.endswith("_pb2.py")
    ]
    named = {str(p.relative_to(ROOT)) for p in files if re.search(r"\bmin_p\b", p.read_text())}
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    listed = re.findall(r"^\d\. `(.+?)`", guide.split("### A sampling field")[1], re.MULTILINE)
    assert len(listed) == 5
    assert named == set(listed)


def test_what_runs_anyway_is_no_part_of_a_request():
    """Nor is what a call contains: a comprehension, a lambda."""
    beat, both, own = "a.py::beat", "a.py::Both.send", "b.py::Own.serve"
    quiet = [{beat: 3, both: 1}, {beat: 4}]
    asked = {beat: 4, both: 3, own: 1, f"{own}.<locals>.<genexpr>": 9, f"{own}.<locals>.inner": 1}
    assert of_request([*quiet, asked]) == {both: 2, own: 1, f"{own}.<locals>.inner": 1}


def test_the_import_chain_is_counted_with_types_and_without(tmp_path):
    top = "from middle import T\nif TYPE_CHECKING:\n    import low\ndef f(x: T) -> low.T: ...\n"
    modules = {"top": top, "middle": "import low\nT = low.T\n", "low": "T = int\n"}
    paths = {name: tmp_path / f"{name}.py" for name in modules}
    for name, path in paths.items():
        path.write_text(modules[name])
    assert imports_of(ast.parse(top), paths) == {"middle": {"T"}, "low": {"low"}}
    assert longest_chain(paths, with_types=True) == ["top", "middle", "low"]
    assert longest_chain(paths, with_types=False) == ["middle", "low"]
