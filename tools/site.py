"""What the site has beside docs/: four pages of the root, the list of decisions, links that leave it.

Owns how the repository's Markdown, whose links are those of the repository, becomes the site's.
Called by mkdocs (`hooks` in mkdocs.yml).

A link to a file that is no page goes to the repository if `REPOSITORY_URL` says where that is, and
else becomes plain text.
"""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "README.md": "index.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the decisions."""
    decisions = sorted(path.name for path in (ROOT / "docs" / "adr").glob("*.md"))
    nav: list[dict[str, Any]] = config.nav or []
    next(item for item in nav if "Decisions" in item)["Decisions"] = [
        f"adr/{name}" for name in decisions
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root's pages; the README is the first page of the site."""
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(
    markdown: str,
    page: Page,
    config: MkDocsConfig,  # noqa: ARG001 - mkdocs passes it by name
    files: Files,
) -> str:
    """Point links of the repository at the site's pages, or at the repository."""
    names = {page: name for name, page in ROOT_PAGES.items()}
    here = names.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def site_link(match: re.Match[str]) -> str:
        bang, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = os.path.normpath(PurePosixPath(here).parent / target)
        inside = ROOT_PAGES.get(
            path, path.removeprefix("docs/") if path.startswith("docs/") else ""
        )
        if inside == "adr":
            inside = files_in(files, "adr/")[0]
        if inside and files.get_file_from_path(inside):
            relative = os.path.relpath(inside, PurePosixPath(page.file.src_uri).parent)
            return f"{bang}[{text}]({relative}{anchor})"
        url = os.environ.get("REPOSITORY_URL", "")
        return f"[{text}]({url}/blob/HEAD/{path}{anchor})" if url else text

    return LINK.sub(site_link, markdown)


def files_in(files: Files, folder: str) -> list[str]:
    """Return the pages of a folder, in order."""
    return sorted(file.src_uri for file in files if file.src_uri.startswith(folder))
