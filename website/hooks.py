"""What the website has beside the pages in docs/: the README and others, the API, example scripts and the live example.

MkDocs calls the functions `on_...`. Links between files of the repository become links between pages of the site; a
linked file that is no page is copied into the site. `make docs` makes the live example first.
"""

from __future__ import annotations

import json
import posixpath
import re
import sys
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

TOP = Path(__file__).parent.parent
sys.path += [str(TOP), str(TOP / "tests")]  # mkdocs runs outside both

from api_page import PUBLIC  # noqa: E402

EXAMPLE = TOP / "build" / "example"
"""The root and archives of the live example, which the Makefile makes."""

PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples": "examples.md",
}
"""Path in the repository -> page of the site, of what is outside docs/."""

_CODE_OR_LINK = re.compile(
    r"(?P<code>^ *```.*?^ *```|`[^`\n]+`)|(?P<start>\]\(|src=\")(?P<target>[^)\s\"]+)", re.MULTILINE | re.DOTALL
)
_API_NAME = re.compile(r"^\| (`([\w.]+)[^`]*`) \|", re.MULTILINE)
_REMOTE_ASSET = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*?\b(?:src|srcset)=["']?(?:https?:)?//[^\s"'>]+"""
    r"""|<link\b(?![^>]*rel=["']?canonical)[^>]*?\bhref=["']?(?:https?:)?//[^\s"'>]+"""
    r"""|(?:url\(|@import )["']?(?:https?:)?//[^\s"')]+"""
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for source, page in PAGES.items():
        if (TOP / source).is_file():
            files.append(File.generated(config, page, abs_src_path=str(TOP / source)))
    files.append(File.generated(config, PAGES["examples"], content=_example_scripts()))
    for section, names in PUBLIC.items():
        text = "\n\n".join([f"# {section}", *(f"::: {name}" for name in names)])
        files.append(File.generated(config, f"api/{_slug(section)}.md", content=text + "\n"))
    for file in _live_example(config):
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at pages of the site, and the names of the API at their documentation."""
    place = page.file.src_uri
    if place == "api.md":
        markdown = _API_NAME.sub(r"| [\1][\2] |", markdown)
    origin = next((source for source, site in PAGES.items() if site == place), f"docs/{place}")

    def relinked(match: re.Match[str]) -> str:
        target, _, anchor = (match["target"] or "").partition("#")
        if match["code"] or not target or ":" in target:
            return match[0]
        linked = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        site = PAGES.get(linked, linked.removeprefix("docs/"))
        if site == linked and files.get_file_from_path(site) is None and (TOP / linked).is_file():
            files.append(File.generated(config, linked, abs_src_path=str(TOP / linked)))
        relative = posixpath.relpath(site, posixpath.dirname(place) or ".")
        return f"{match['start']}{relative}{'#' if anchor else ''}{anchor}"

    return _CODE_OR_LINK.sub(relinked, markdown) if place != "example.md" else markdown


def on_post_build(config: MkDocsConfig) -> None:
    """Check that no page loads anything from another host, or names a folder of this machine.

    Raises:
        PluginError: one does.
    """
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix not in (".html", ".css"):
            continue
        text = path.read_text()
        if found := _REMOTE_ASSET.search(text):
            raise PluginError(f"{path} loads a file from another host: {found[0]}")
        if str(TOP) in text:
            raise PluginError(f"{path} names the folder {TOP} of this machine")


def _slug(section: str) -> str:
    return re.sub(r"[^a-z]+", "-", section.lower())


def _example_scripts() -> str:
    parts = ["# Example scripts", "The scripts in the folder `examples/`; tests run them."]
    for path in sorted((TOP / "examples").glob("*.py")):
        parts += [f"## {path.name}", f"```python\n{path.read_text()}```"]
    return "\n\n".join(parts) + "\n"


def _live_example(config: MkDocsConfig) -> list[File]:
    """The page of the live example, with its reports and pictures.

    Raises:
        PluginError: the example was not made.
    """
    root = EXAMPLE / "ixi-data"
    reports = sorted(root.glob("runs/*/report.html"))
    if len(reports) != 1:
        raise PluginError(f"{root} must hold one finished run; `make docs` makes it")
    run = reports[0].parent
    settings = json.loads((run / "config.json").read_text())["config"]
    version = root / "datasets" / settings["dataset"].replace("@", "/")
    subjects = pd.read_csv(version / "manifest.csv")
    used = subjects[subjects["status"] == "used"]
    sheet = sorted(run.glob("samples/*-colour.png"))[-1]
    facts: dict[str, Any] = {
        "version": version.name,
        "found": len(subjects),
        "used": len(used),
        "subject": used["subject_id"].iloc[0],
        "run": run.name,
        "steps": settings["steps"],
        "side": settings["side"],
        "width": settings["width"],
        "trained": int((used["split"] == "train").sum()),
        "sheet": sheet.name.removesuffix("-colour.png"),
    }
    copied = {
        "dataset.html": version / "report.html",
        "run.html": run / "report.html",
        "pair.jpg": version / "pictures" / f"{facts['subject']}.jpg",
        "samples.png": sheet,
    }
    page = Template((Path(__file__).parent / "example.md").read_text()).substitute(facts)
    return [
        File.generated(config, "example.md", content=page),
        *(File.generated(config, f"example/{name}", abs_src_path=str(path)) for name, path in copied.items()),
    ]
