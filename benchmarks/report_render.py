"""A report's sections, and what they look like in Markdown, LaTeX and HTML."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right }
.text { text-align: left }
.warning { background: #fdecea; border-left: 4px solid #c0392b; padding: .5rem 1rem }
img { max-width: 100% }
"""


@dataclass(frozen=True, slots=True)
class Table:
    """A table: first so many columns of ``texts``, then numbers."""

    caption: str
    head: Sequence[str]
    lines: Sequence[Sequence[str]]
    texts: int = 1


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a report.

    Attributes:
        caption: its caption.
        kind: media type such as ``image/png``.
        data: content of its file.
        pdf: the same for LaTeX, where that cannot read ``kind``.
    """

    caption: str
    kind: str
    data: bytes
    pdf: bytes = b""

    @property
    def file(self) -> str:
        """Where it lies beside a Markdown report."""
        ending = self.kind.removeprefix("image/").partition("+")[0]
        return f"pictures/{hashlib.sha256(self.data).hexdigest()[:12]}.{ending}"

    @property
    def printed(self) -> str:
        """Where LaTeX finds it."""
        return f"{self.file.rpartition('.')[0]}.pdf" if self.pdf else self.file


@dataclass(frozen=True, slots=True)
class Section:
    """One part of a report.

    Attributes:
        title: its heading.
        warnings: what must not be overlooked.
        findings: what the tables show, a sentence each.
        tables: its tables.
        pictures: its pictures.
        notes: where it comes from, a fact each.
    """

    title: str
    warnings: Sequence[str] = ()
    findings: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    notes: Sequence[str] = ()


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Return a report as Markdown; its pictures are files beside it, see `Picture.file`."""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += [f"**{warning}**" for warning in section.warnings]
        parts += _list(section.findings)
        for table in section.tables:
            parts += [f"### {table.caption}", markdown_lines(table)]
        parts += [f"![{each.caption}]({each.file})\n*{each.caption}*" for each in section.pictures]
        parts += _list(section.notes)
    return "\n\n".join(parts) + "\n"


def _list(items: Sequence[str]) -> list[str]:
    return ["\n".join(f"- {item}" for item in items)] if items else []


def markdown_lines(table: Table) -> str:
    """Return a table's lines in Markdown, aligned so that they can be read as they are."""
    lines = [_cells(line, _pipe) for line in (table.head, *table.lines)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]

    def aligned(line: Sequence[str]) -> str:
        pairs = enumerate(zip(line, widths, strict=True))
        cells = [c.ljust(w) if k < table.texts else c.rjust(w) for k, (c, w) in pairs]
        return f"| {' | '.join(cells)} |"

    rule = ["-" * w if k < table.texts else "-" * (w - 1) + ":" for k, w in enumerate(widths)]
    return "\n".join([aligned(lines[0]), aligned(rule), *map(aligned, lines[1:])])


def without_empty_columns(table: Table) -> Table:
    """Return a table without the columns in which no line has anything."""
    kept = [k for k in range(len(table.head)) if any(line[k] for line in table.lines)]
    lines = [[line[k] for k in kept] for line in table.lines]
    texts = sum(k < table.texts for k in kept)
    return Table(table.caption, [table.head[k] for k in kept], lines, texts)


def latex(sections: Sequence[Section]) -> str:
    """Return a report as LaTeX to be put into a document; it says what that needs."""
    needs = (
        "% \\usepackage{booktabs,graphicx}\n"
        "% \\graphicspath{{FOLDER/}}, where the folder of this file is not the document's\n"
    )
    return "\n".join([needs, *map(_latex_section, sections)])


def _latex_section(section: Section) -> str:
    parts = [rf"\subsection*{{{_tex(section.title)}}}", ""]
    parts += [rf"\textbf{{{_tex(text)}}}" + "\n" for text in section.warnings]
    parts += _latex_list(section.findings)
    parts += [_latex_table(section, table) for table in section.tables]
    parts += [_latex_figure(section, picture) for picture in section.pictures]
    return "\n".join([*parts, *_latex_list(section.notes), r"\clearpage", ""])


def _latex_list(items: Sequence[str]) -> list[str]:
    lines = [rf"\item {_tex(item)}" for item in items]
    return [r"\begin{itemize}\raggedright", *lines, r"\end{itemize}", ""] if items else []


def _latex_figure(section: Section, picture: Picture) -> str:
    return "\n".join(
        [
            r"\begin{figure}[htbp]",
            r"\centering",
            r"\includegraphics[width=\linewidth,height=0.8\textheight,keepaspectratio]"
            rf"{{{picture.printed}}}",
            rf"\caption{{{_tex(f'{section.title}: {picture.caption}')}}}",
            r"\end{figure}",
            "",
        ]
    )


def _latex_table(section: Section, table: Table) -> str:
    lines = [" & ".join(_cells(line, _tex)) + r" \\" for line in (table.head, *table.lines)]
    columns = "l" * table.texts + "r" * (len(table.head) - table.texts)
    parts = [f"{section.title}: {table.caption}", *section.warnings]
    caption = ". ".join(_tex(part.removesuffix(".")) for part in parts)
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering",
            rf"\caption{{{caption}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
            "",
        ]
    )


def html_page(title: str, sections: Sequence[Section]) -> str:
    """Return a report as one HTML page that needs no other file."""
    name = html.escape(title)
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>',
        f"<style>{_STYLE}</style><h1>{name}</h1>",
        *map(_html_section, sections),
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _html_section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    parts += [f'<p class="warning">{html.escape(text)}</p>' for text in section.warnings]
    parts += _html_list(section.findings)
    parts += [_html_table(table) for table in section.tables]
    for picture in section.pictures:
        caption = html.escape(picture.caption)
        data = base64.b64encode(picture.data).decode()
        source = f"data:{picture.kind};base64,{data}"
        parts.append(f'<h3>{caption}</h3><img alt="{caption}" src="{source}">')
    return "\n".join(parts + _html_list(section.notes))


def _html_list(items: Sequence[str]) -> list[str]:
    texts = "".join(f"<li>{html.escape(item)}</li>" for item in items)
    return [f"<ul>{texts}</ul>"] if items else []


def _html_table(table: Table) -> str:
    lines = [
        f"<tr>{''.join(_html_cells(tag, line, table.texts))}</tr>"
        for tag, line in [("th", table.head), *(("td", line) for line in table.lines)]
    ]
    return f"<h3>{html.escape(table.caption)}</h3><table>{''.join(lines)}</table>"


def _html_cells(tag: str, line: Sequence[str], texts: int) -> list[str]:
    kinds = [' class="text"' if k < texts else "" for k in range(len(line))]
    cells = zip(kinds, _cells(line, html.escape), strict=True)
    return [f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in cells]


def _cells(line: Sequence[str], escape: Callable[[str], str]) -> list[str]:
    return [escape(cell) for cell in line]


def _pipe(text: str) -> str:
    return text.replace("|", r"\|")


def _tex(text: str) -> str:
    escaped = "".join(_LATEX.get(letter, letter) for letter in text)
    return escaped.replace("--", "-{}-")  # else one dash
