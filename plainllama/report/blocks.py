"""The blocks that a page is made of, each in HTML and in Markdown."""

import json
import re
from html import escape
from typing import NamedTuple


class Block(NamedTuple):
    """A piece of the page, in both of its forms."""

    html: str
    markdown: str
    chart: dict | None = None  # a chart's numbers, for page.js


def heading(text: str, level: int) -> Block:
    """Make a heading; level 1 is the page's own."""
    return Block(f"<h{level}>{escape(text)}</h{level}>", f"{'#' * level} {as_markdown(text)}")


def paragraph(text: str) -> Block:
    """Make a paragraph."""
    return Block(f"<p>{escape(text)}</p>", as_markdown(text))


def table_block(heads: list[str], rows: list[list[str]]) -> Block:
    """Make a table of texts."""
    html = [f"<th>{'</th><th>'.join(map(escape, heads))}</th>", *("".join(map(cell, row))
                                                                for row in rows)]
    rule = ["---"] * len(heads)
    lines = [f"| {' | '.join(map(as_markdown, row))} |" for row in [heads, rule, *rows]]
    return Block(f'<div class="table"><table><tr>{"</tr><tr>".join(html)}</tr></table></div>',
                 "\n".join(lines))


def cell(text: str) -> str:
    """Make a table's cell; numbers lie to the right, in digits of one width."""
    number = re.fullmatch(
        r"[-+–]?[\d.,:]*[kMBT%]?( ± [\d.]+| of [\d.,]+| \([-\d.]+ to [-\d.]+\))?", text)
    return f'<td{" class=n" if number else ""}>{escape(text)}</td>'


def side_by_side(heads: list[str], values: list[dict]) -> Block:
    """Make a table with a row for every key of the dicts in `values`, a column for every dict."""
    columns = [flatten(value) for value in values]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name, "–") for column in columns)] for name in names]
    return table_block(["", *heads], rows)


def fold(summary: str, blocks: list[Block], opened: bool = False) -> list[Block]:
    """Lay blocks behind a line that opens them; in Markdown they are below it."""
    begin = Block(f"<details{' open' if opened else ''}><summary>{escape(summary)}</summary>",
                  f"**{as_markdown(summary)}**")
    return [begin, *blocks, Block("</details>", "")]


def flatten(value: dict, prefix: str = "") -> dict[str, str]:
    """Bring nested dicts to one level: {'git': {'dirty': True}} -> {'git dirty': 'true'}."""
    flat: dict[str, str] = {}
    for name, part in value.items():
        if isinstance(part, dict):
            flat |= flatten(part, f"{prefix}{name} ")
        else:
            flat[prefix + name] = part if isinstance(part, str) else as_said(part)
    return flat


def as_said(value) -> str:
    """Write a value as JSON, text of any script as itself."""
    return json.dumps(value, ensure_ascii=False)


def plain(text: str) -> str:
    """Replace what UTF-8 cannot hold (half a surrogate pair) by a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def as_markdown(text: str) -> str:
    """Escape text so that Markdown shows it as it is, also in a table's cell."""
    return re.sub(r"([\\`*\[\]<>|~#&]|\b_|_\b)", r"\\\1", " ".join(text.split()))


def short(value: float | None) -> str:
    """Write a number for people: 0.25, 124085760 -> 124.1M."""
    if value is None:
        return "–"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.99995:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"
