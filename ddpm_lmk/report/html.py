"""Pieces of the page as HTML text: numbers with spreads, tables, figures. No number is made here."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template

from ddpm_lmk.inference.scoring import Spread


def page(title: str, body: str) -> str:
    """A whole page; nothing in it points outside."""
    template = resources.files("ddpm_lmk").joinpath("report/page.html").read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(title), body=body)


def plain_spread(value: Spread) -> str:
    """`3.97 ± 0.08`, or the bare number of a single run; for Markdown and tables of words."""
    return f"{value[0]:.2f}" if value[1] is None else f"{value[0]:.2f} ± {value[1]:.2f}"


def spread_text(value: Spread, digits: int = 2) -> str:
    """`3.97 ±0.08` with a pale deviation, as HTML."""
    mean, std, _ = value
    text = f"{mean:.{digits}f}"
    return text if std is None else f'{text} <span class="spread">±{std:.{digits}f}</span>'


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign, the minus as wide as the plus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def note(text: str) -> str:
    """A paragraph of explanation; `text` is HTML."""
    return f'<p class="note">{text}</p>'


def cell(text: str, kind: str = "", *, tag: str = "td", span: int = 1) -> str:
    """A cell of a table; `text` is HTML, `kind` the names of its classes."""
    classes = f' class="{kind.strip()}"' if kind.strip() else ""
    columns = f' colspan="{span}"' if span != 1 else ""
    return f"<{tag}{classes}{columns}>{text}</{tag}>"


def head(text: str, kind: str = "", *, span: int = 1) -> str:
    """A cell of a heading."""
    return cell(text, kind, tag="th", span=span)


def row(cells: Iterable[str], kind: str = "") -> str:
    """A line of a table."""
    return f'<tr class="{kind}">{"".join(cells)}</tr>' if kind else f"<tr>{''.join(cells)}</tr>"


def heading_row(text: str, width: int) -> str:
    """A line between the groups of a table."""
    return f'<tr class="heading"><td colspan="{width}">{text}</td></tr>'


def table(heads: Iterable[str], lines: Iterable[str], kind: str = "") -> str:
    """A table that scrolls sideways on a narrow screen; `heads` and `lines` are rows."""
    classes = f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll"><table{classes}><thead>{"".join(heads)}</thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


@dataclass(frozen=True)
class FactsTable:
    """A section of the page that is a table of words; nothing where it has no rows.

    Attributes:
        groups: words above so many headings each.
        intro: text above the table.
        remark: text below it.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    groups: Sequence[tuple[str, int]] = ()
    intro: str = ""
    remark: str = ""

    def html(self) -> str:
        """The section with its heading."""
        if not self.rows:
            return ""
        above = "".join(f'<th colspan="{count}">{escape(word)}</th>' for word, count in self.groups)
        heads = [row([above], "protocols")] if above else []
        heads.append(row(head(escape(word)) for word in self.headings))
        lines = [row(cell(escape(word)) for word in words) for words in self.rows]
        intro = note(self.intro) if self.intro else ""
        remark = f'<p class="note wide">{escape(self.remark)}</p>' if self.remark else ""
        return f"<h2>{escape(self.title)}</h2>{intro}{table(heads, lines, 'words')}{remark}"


def figure(content: str, caption: str, title: str = "") -> str:
    """A drawing or picture in a frame; `caption` is HTML."""
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f"<figure>{heading}{content}<figcaption>{caption}</figcaption></figure>"


def figures(drawn: Iterable[str], kind: str = "figures") -> str:
    """Frames side by side."""
    return f'<div class="{kind}">{"".join(drawn)}</div>'


def image(data: bytes, description: str, kind: str = "jpeg") -> str:
    """A picture that lies in the page itself."""
    encoded = base64.b64encode(data).decode("ascii")
    return f'<img src="data:image/{kind};base64,{encoded}" alt="{escape(description)}" loading="lazy">'
