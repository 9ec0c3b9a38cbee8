"""What a stranger meets first: the README, the changelog, the site, and what GitHub runs."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
MAX_README_LINES = 150


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def test_the_recipes_name_files_and_tests_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = set(re.findall(r"`((?:\w+/)+\w+\.(?:py|proto))`", text))
    tests = set(re.findall(r"`(test_\w+)`", text))
    assert len(paths) > 25 and len(tests) > 4
    for path in paths:
        assert (ROOT / path).exists(), path
    sources = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    for name in tests:
        assert any(f"def {name}(" in source for source in sources), name


def test_the_changelog_has_each_kind_once_a_release_and_nothing_outside_them():
    releases = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)[1:]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version in releases[0].splitlines()[0]
    for release in releases:
        preface, *sections = re.split(r"^### ", release, flags=re.M)
        kinds = [section.splitlines()[0] for section in sections]
        assert len(preface.strip().splitlines()) == 1, preface
        assert kinds == [kind for kind in KINDS if kind in kinds], kinds


def test_every_page_is_in_the_sites_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert re.search(rf"[-:] {re.escape(page.name)}$", text, re.M), page.name


def test_workflows_run_the_makefile_and_nothing_else_builds_or_tests():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    called = set()
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            for command in filter(None, (step.get("run") for step in job["steps"])):
                assert command.startswith(("make ", "gh release ")), command
                if command.startswith("make "):
                    called |= {
                        word for word in command.split()[1:] if word.isalpha() or "-" in word
                    }
    called = {word for word in called if "=" not in word and not word.startswith("-")}
    assert {"check", "test", "test-fast", "docs", "dist"} <= called <= targets, called - targets


def test_issue_forms_are_yaml_with_what_github_needs():
    for name in ("bug", "feature"):
        path = ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml"
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= set(form)
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert all({"id", "attributes"} <= set(field) for field in fields)
    assert yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text())["version"] == 2
