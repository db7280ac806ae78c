"""The code on a page of the documents: what is run from top to bottom in one folder, and what is only shown.

A fenced block of `bash` or `python` is run. One of any other language with a title is the file of that name. `text` is
what a command prints. An HTML comment before a block says more, and readers do not see it:

    <!-- test: slow dicom -->          at the top of a page: it takes minutes; extras that it needs
    <!-- run                           commands that prepare what the page takes for granted, e.g. the reader's films
    ...
    -->
    <!-- not run: REASON -->           the next block is only shown
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / path for path in ("README.md", "CONTRIBUTING.md", "configs/README.md", "launch/README.md")),
    ROOT / "benchmarks" / "README.md",
)
LONGEST_S = 900
PART = re.compile(
    r"""^<!--\ run\n(?P<hidden>.*?)^-->
      | ^<!--\ not\ run:(?P<reason>.*?)-->
      | ^(?P<indent>\ *)```(?P<language>\w*)(?P<facts>[^\n]*)\n(?P<text>.*?)^(?P=indent)```\ *$""",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block, or a hidden preparation."""

    line: int
    language: str
    text: str
    title: str | None = None
    is_run: bool = True


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page in their order."""
    text, is_shown_only = page.read_text(), False
    for part in PART.finditer(text):
        line = text.count("\n", 0, part.start()) + 1
        if part["reason"] is not None:
            assert part["reason"].strip(), f"{page}:{line}: not run, but why?"
            is_shown_only = True
        elif part["hidden"] is not None:
            yield Block(line, "bash", part["hidden"])
        else:
            title = re.search(r'title="([^"]+)"', part["facts"])
            code = textwrap.dedent(part["text"])
            yield Block(line, part["language"], code, title and title[1], is_run=not is_shown_only)
            is_shown_only = False


def needs(page: Path) -> list[str]:
    """`slow` and the extras that the code of a page needs."""
    told = re.search(r"^<!-- test: (.*?) -->", page.read_text(), re.MULTILINE)
    return told[1].split() if told else []


def script(page: Path) -> str:
    """All code of a page as one bash script; empty where nothing is run."""
    lines, python = [], 0
    for block in blocks(page):
        if not block.is_run or block.language == "text":
            continue
        lines.append(f'at={page.relative_to(ROOT)}:{block.line}; echo "---- $at"')
        if block.title is not None:
            lines += [f"mkdir -p {Path(block.title).parent}", f"cat > {block.title} <<'END OF FILE'", block.text]
            lines.append("END OF FILE")
        elif block.language == "python":
            python += 1
            lines += [f"cat > block{python}.py <<'END OF FILE'", block.text, "END OF FILE", f"python block{python}.py"]
        elif block.language == "bash":
            lines.append(block.text)
    if not any(line for line in lines if not line.startswith("at=")):
        return ""
    return "\n".join(["set -euo pipefail", "trap 'echo \"ended at $at\" >&2' EXIT", *lines, "at='the end'"]) + "\n"
