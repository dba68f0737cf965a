"""What the website has beside the pages in docs/: the README and others, the API, example scripts and the live example.

MkDocs calls the functions `on_...`. Links between files of the repository become links between pages of the site; a
linked file that is no page is copied into the site. `make docs` makes the live example first.
"""

from __future__ import annotations

import inspect
import json
import posixpath
import re
import sys
from html import escape
from importlib import import_module
from itertools import chain
from pathlib import Path
from string import Template
from typing import Any, get_type_hints

import pandas as pd
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel

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

CONFIGURATIONS = {
    "ixi_etl.config.RefreshConfig",
    "ixi_etl.config.DatasetConfig",
    "ixi_etl.config.DigitsConfig",
    "ixi_etl.config.DigitsDataset",
    "model.config.TrainConfig",
}
"""Classes of the API that are shown with a table of their fields, in place of their methods."""

_CODE_OR_LINK = re.compile(
    r"(?P<code>^ *```.*?^ *```|`[^`\n]+`)|(?P<start>\]\(|src=\")(?P<target>[^)\s\"]+)", re.MULTILINE | re.DOTALL
)
_API_NAME = re.compile(r"^\| (`([\w.]+)[^`]*`) \|", re.MULTILINE)
_ASSET = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*?\bsrc=["']?([^\s"'>]+)"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|icon|preload|preconnect))[^>]*?\bhref=["']?([^\s"'>]+)"""
    r"""|(?:url\(|@import )["']?([^\s"')#]+)"""
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for source, page in PAGES.items():
        if (TOP / source).is_file():
            files.append(File.generated(config, page, abs_src_path=str(TOP / source)))
    files.append(File.generated(config, PAGES["examples"], content=_example_scripts()))
    for section, names in PUBLIC.items():
        documented = [name for name in names if name.rpartition(".")[0] not in names]  # a class includes its methods
        text = "\n\n".join([f"# {section}", *map(_documentation, documented)])
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
        if match["code"]:
            return match[0].replace("\\|", "|")  # in a table; the website's parser shows the backslash
        if not target or ":" in target:
            return match[0]
        linked = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        site = PAGES.get(linked, linked.removeprefix("docs/"))
        if site == linked and files.get_file_from_path(site) is None and (TOP / linked).is_file():
            files.append(File.generated(config, linked, abs_src_path=str(TOP / linked)))
        relative = posixpath.relpath(site, posixpath.dirname(place) or ".")
        return f"{match['start']}{relative}{'#' if anchor else ''}{anchor}"

    return _CODE_OR_LINK.sub(relinked, markdown) if place != "example.md" else markdown


def on_post_build(config: MkDocsConfig) -> None:
    """Check that every file that a page loads is part of the site, and that no page names a folder of this machine.

    Raises:
        PluginError: one does not, or does.
    """
    site = Path(config.site_dir)
    for path in sorted(site.rglob("*")):
        if path.suffix not in (".html", ".css"):
            continue
        text = path.read_text()
        for asset in filter(None, chain.from_iterable(_ASSET.findall(text))):
            if not asset.startswith("data:") and not _is_in(site, path, asset):
                raise PluginError(f"{path} loads {asset}, which is not part of the site")
        if str(TOP) in text:
            raise PluginError(f"{path} names the folder {TOP} of this machine")


def _is_in(site: Path, page: Path, asset: str) -> bool:
    """Whether the site has the file that a page loads; `404.html` gives absolute paths."""
    name = re.split("[?#]", asset)[0]
    return "//" not in name and ((site / name[1:]) if name[:1] == "/" else (page.parent / name)).is_file()


def _slug(section: str) -> str:
    return re.sub(r"[^a-z]+", "-", section.lower())


def _documentation(name: str) -> str:
    """What mkdocstrings replaces by the signature and the docstring; of a configuration with a table of its fields."""
    if name not in CONFIGURATIONS:
        return f"::: {name}"
    module, _, attribute = name.rpartition(".")
    config = getattr(import_module(module), attribute)
    types = get_type_hints(config)  # without the metadata of Annotated
    rows = []
    for field, info in config.model_fields.items():
        has_default = not (info.is_required() or info.default_factory or isinstance(info.default, BaseModel))
        cells = (field, inspect.formatannotation(types[field]), repr(info.default) if has_default else "")
        codes = "".join(f"<td><code>{escape(cell)}</code></td>" if cell else "<td></td>" for cell in cells)
        rows.append(f"<tr>{codes}<td>{escape(info.description or '')}</td></tr>")
    heads = "".join(f"<th>{head}</th>" for head in ("field", "type", "default", "description"))
    # In HTML, as a description is not Markdown.
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"::: {name}\n    options: {{ members: false }}\n\n{table}"


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
        "compared.html": version / "compared.html",  # to which that page links
        "run.html": run / "report.html",
        "pair.jpg": version / "pictures" / f"{facts['subject']}.jpg",
        "samples.png": sheet,
    }
    page = Template((Path(__file__).parent / "example.md").read_text()).substitute(facts)
    return [
        File.generated(config, "example.md", content=page),
        *(File.generated(config, f"example/{name}", abs_src_path=str(path)) for name, path in copied.items()),
    ]
