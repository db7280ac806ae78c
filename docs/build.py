"""Build the documents as a site: `make docs`, or `python docs/build.py [FOLDER]`. Nothing is fetched.

The pages are those of this folder, pages kept elsewhere, references made from the code, and the notebook. Links hold in
the repository (`../configs/README.md`) and are turned into those of the site here; so is the path of a page in
backticks, under the name that it has there. All of it is laid into one folder, of which MkDocs with Material makes the
site of `mkdocs.yml`, strictly. What is laid there is plain Markdown, so that another builder can take over: Material
ends in 2027, and its successor, Zensical, reads the same `mkdocs.yml`.
"""

from __future__ import annotations

import argparse
import os
import posixpath
import re
import tempfile
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
STYLE = ("site.css", "iframe-worker.js")
NOTEBOOK = "first-landmarks"
KEPT_ELSEWHERE = {
    "README.md": "index.md",
    "configs/README.md": "run-files.md",
    "launch/README.md": "clusters.md",
    "benchmarks/README.md": "benchmarks.md",
    "tests/faults/README.md": "fault-tests.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
FENCED = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
LINK = re.compile(r"(?<=\]\()([^)\s:#]+)(?=[)#])")
NAMED = re.compile(r"(?<!\[)`((?:[\w.-]+/)+[\w.-]+\.(?:md|ipynb)|CHANGELOG\.md|CONTRIBUTING\.md)`")
# A list or a table may follow a paragraph at once in the Markdown of repositories, not in Python's.
BEGUN = re.compile(r"^([^\n*| ].*)\n(?=\* | ?\| | - )", re.MULTILINE)


def lay_out(folder: Path) -> None:
    """Write every page and picture of the site to a new folder."""
    pages = {f"docs/{path.name}": path.name for path in sorted((ROOT / "docs").glob("*.md"))} | KEPT_ELSEWHERE
    named = pages | {f"docs/{NOTEBOOK}.ipynb": f"{NOTEBOOK}.md"}
    beside = {f"docs/{name}": name for name in STYLE}
    for source in pages:
        found = (resolved(source, link) for link in PICTURE.findall((ROOT / source).read_text()))
        beside |= {path: posixpath.basename(path) for path in found if (ROOT / path).is_file()}
    folder.mkdir(parents=True)
    for source, name in pages.items():
        (folder / name).write_text(on_the_site((ROOT / source).read_text(), source, named | beside))
    for source, name in beside.items():
        (folder / name).write_bytes((ROOT / source).read_bytes())
    text, outputs = notebook_page()
    (folder / f"{NOTEBOOK}.md").write_text(on_the_site(text, f"docs/{NOTEBOOK}.ipynb", named))
    for name, content in outputs.items():
        (folder / name).write_bytes(content)
    (folder / "commands.md").write_text(command_reference())
    (folder / "settings.md").write_text(settings_reference())


def resolved(source: str, link: str) -> str:
    """The path in the repository that a page means by a link."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def on_the_site(text: str, source: str, site: dict[str, str]) -> str:
    """A page of the repository, at `source`, with links between pages of the site; those in code stay.

    Args:
        site: name on the site by path in the repository.
    """

    def linked(match: re.Match[str]) -> str:
        return site.get(resolved(source, match[1]), match[1])

    def named(match: re.Match[str]) -> str:
        uri = site.get(match[1])
        return f"[{titles()[uri]}]({uri})" if uri in titles() and uri != site[source] else match[0]

    def shown(prose: str) -> str:
        return BEGUN.sub(r"\1\n\n", NAMED.sub(named, LINK.sub(linked, prose)))

    return "".join(part if part.lstrip().startswith("```") else shown(part) for part in FENCED.split(text))


@cache
def titles() -> dict[str, str]:
    """What the navigation calls each page."""
    sections = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    entries = [entry for section in sections for pages in section.values() for entry in pages]
    return {uri: title for entry in entries for title, uri in entry.items()}


def command_reference() -> str:
    """Every command with its arguments and options, as Typer describes them."""
    import typer
    from typer.cli import get_docs_for_click

    from ddpm_lmk.cli.app import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="ddpm-lmk", title="Commands")
    # Lists of commands are cut off for a terminal: a command's own section says the same in full.
    text = re.sub(r"\*\*Commands\*\*:\n\n(?:\* .*\n)+\n", "", text)
    return text.replace("```console\n$ ", "```text\n")


def settings_reference() -> str:
    """Every key of run, sweep and launch files, from the models that check them."""
    from ddpm_lmk.config import RunConfig
    from ddpm_lmk.config.explain import explain
    from ddpm_lmk.launcher.placement import LaunchFile
    from ddpm_lmk.sweep.file import SweepFile

    lines = [
        "# Settings",
        "",
        "Made from the code; `ddpm-lmk pretrain --explain --all` and `ddpm-lmk sweep --explain` print the same. A word "
        "in brackets is the kind of the section that has the key.",
    ]
    for title, model in {"Run files": RunConfig, "Sweep files": SweepFile, "Launch files": LaunchFile}.items():
        lines += ["", f"## {title}", "", (model.__doc__ or "").splitlines()[0]]
        heading = None
        for key, kind, default, bound, text in explain(model):
            section = key.partition(".")[0] if "." in key else ""
            if section != heading:
                lines += ["", f"### {section}"] if section else []
                lines += ["", "| key | default | type | what it is |", "|---|---|---|---|"]
            heading = section
            facts = f"{kind}; {bound}" if bound else kind
            lines.append(f"| `{key}` | `{_cell(default)}` | {_cell(facts)} | {_cell(text)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text that does not end the cell of a table."""
    return text.replace("|", "\\|")


def notebook_page() -> tuple[str, dict[str, bytes]]:
    """The notebook as it was run last: its page, and its pictures by name."""
    from nbconvert import MarkdownExporter
    from traitlets.config import Config

    joined = Config({"CoalesceStreamsPreprocessor": {"enabled": True}})  # what a cell printed comes in pieces
    text, resources = MarkdownExporter(config=joined).from_filename(str(ROOT / "docs" / f"{NOTEBOOK}.ipynb"))
    return text, resources["outputs"]


def main() -> None:
    """Build the site; the first warning ends it with exit code 1."""
    parser = argparse.ArgumentParser(description="Build the documents as a site.")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "site")
    out = parser.parse_args().folder.resolve()
    os.environ["NO_MKDOCS_2_WARNING"] = "1"  # of Material, about versions that the constraints leave out

    from mkdocs.__main__ import cli

    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder) / "docs")
        config = Path(folder) / "mkdocs.yml"
        config.write_text((ROOT / "mkdocs.yml").read_text())
        cli(["build", "--strict", "--config-file", str(config), "--site-dir", str(out)])


if __name__ == "__main__":
    main()
