"""The blocks that a page is made of, each of them (HTML, Markdown)."""

import json
import re
from html import escape

# ---- the page as blocks, each of them (HTML, Markdown)

def text(words: str, mark: str = "") -> tuple[str, str]:
    """A paragraph or, with `mark` '#' or '##', a heading."""
    tag = f"h{len(mark)}" if mark else "p"
    return f"<{tag}>{escape(words)}</{tag}>", f"{mark} {plain(words)}".strip()


def table(heads: list, rows: list) -> tuple[str, str]:
    """A table of texts."""
    html = [f"<td>{'</td><td>'.join(map(escape, row))}</td>" for row in [heads, *rows]]
    lines = [f"| {' | '.join(map(plain, row))} |" for row in [heads, ["---"] * len(heads), *rows]]
    return f"<div><table><tr>{'</tr><tr>'.join(html)}</tr></table></div>", "\n".join(lines)


def plain(words: str) -> str:
    """Text that Markdown shows as it is, also in a table's cell."""
    return re.sub(r"([\\`*\[\]<>|~#&]|\b_|_\b)", r"\\\1", " ".join(words.split()))


def short(value: float | None) -> str:
    """A number for people: 0.25, 124085760 -> 124.1M."""
    if value is None:
        return "–"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.99995:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def flat(value: dict, before: str = "") -> dict:
    """{'git': {'dirty': True}} -> {'git dirty': 'true'}."""
    found: dict[str, str] = {}
    for name, part in value.items():
        if isinstance(part, dict):
            found |= flat(part, f"{before}{name} ")
        else:
            found[before + name] = part if isinstance(part, str) else json.dumps(part)
    return found


def side_by_side(heads: list, values: list) -> tuple:
    """A table with a row for every key of the dicts in `values`, a column for every dict."""
    columns = [flat(one) for one in values]
    names = dict.fromkeys(name for one in columns for name in one)
    return table(["", *heads], [[name, *(one.get(name, "–") for one in columns)] for name in names])
