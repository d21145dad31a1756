"""Rows rewritten by a model: a template that a row fills, and what the answer did to the numbers of
the values that it holds.

A number is what is written in digits, compared as a value: 12.50 is 12.5, 1e3 and 1,000 are 1000,
05 is 5. A comma belongs to it before each three digits, a point before decimals (12,50 is two
numbers). A minus in front counts, also before a currency's sign, unless it joins (5-7). So
2024-01-05 and 05.01.2024 are three numbers each, the same ones; of 12 % the number is 12; one that
is put into words is lost.
"""

import json
import re
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

from plainllama.settings import UserError, nearest

ADDED = {"lost", "added", "copied"}  # the keys of compared()
BRACES = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")
WHOLE = r"(?:(?<!\d,)\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
POINT = r"\.\d+(?!\d|\.\d)"  # and decimals; the points of 05.01.2024 part whole numbers
NUMBER = re.compile(rf"(?:(?<![\w\u2212-])([\u2212-])[$€£¥₽]?)?"
                    rf"((?:(?<!\d\.){WHOLE}{POINT}|{WHOLE}|(?<![\w.]){POINT})"
                    r"(?:[eE][+-]?\d{1,3}(?!\w))?)")


# ---- a template and a row -> a prompt

def read_template(path: str) -> list[str]:
    """Read a template, without the line break at its end: texts and, between each two, the name of
    a field. UserError for a brace that belongs to none, or without a field."""
    if not Path(path).is_file():
        raise UserError(f"no file {path}; --template takes a text with {{FIELD}} in it")
    try:
        text = Path(path).read_text("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text: {error}") from None
    parts, end = [""], 0
    for found in BRACES.finditer(text):
        parts[-1] += text[end:found.start()]
        end = found.end()
        if found[1]:
            parts += [found[1], ""]
        elif len(found[0]) == 2:
            parts[-1] += found[0][0]
        else:
            line = text.count("\n", 0, found.start()) + 1
            raise UserError(f"{path}:{line}: {found[0]!r} is no field; write {{FIELD}}, and "
                            "{{ for a {, }} for a }")
    parts[-1] += text[end:]
    if len(parts) == 1:
        raise UserError(f"{path} names no field of the rows; write {{FIELD}} where one goes")
    return parts


def check_fields(template: list[str], row: dict, where: str) -> None:
    """Raise UserError if a row lacks a field."""
    for name in template[1::2]:
        if name not in row:
            raise UserError(f"{where} has no {name!r}, which --template names; its fields are: "
                            f"{', '.join(row) or 'none'}{nearest(name, row)} ({{{{ is a brace)")


def as_text(value: Any) -> str:
    """Write a value: text as it is, a date and what else JSON lacks as Python does, others as
    JSON."""
    if value is None or isinstance(value, bool | int | float | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def fill(template: list[str], row: dict) -> str:
    """Give the prompt that a row makes of a template."""
    return "".join(as_text(row[part]) if i % 2 else part for i, part in enumerate(template))


# ---- an answer -> what it did

def numbers_in(text: str) -> list[tuple[str, Decimal]]:
    """List the numbers of a text: how each is written, and its value."""
    return [(found[0], Decimal(("-" if found[1] else "") + found[2].replace(",", "")))
            for found in NUMBER.finditer(text)]


def compared(values: list[str], prompt: str, completion: str) -> dict:
    """Tell of a completion which numbers of the row's values it lost (one that stands there twice
    must come twice), which it has that are in none of them, and whether it is but a piece of the
    prompt, up to case and spaces."""
    there, came = numbers_in("\n".join(values)), numbers_in(completion)
    left, lost = Counter(value for _, value in came), []
    for text, value in there:
        left[value] -= 1
        if left[value] < 0:
            lost.append(text)
    known = {value for _, value in there}
    said, given = (" ".join(text.casefold().split()) for text in (completion, prompt))
    return {"lost": lost, "added": [text for text, value in came if value not in known],
            "copied": said != "" and said in given}


def judge(template: list[str], rows: list[dict], made: dict[int, dict]) -> dict[str, int]:
    """Add compared() to what was made of each row; count what it found."""
    counts: Counter[str] = Counter(rows=len(rows))
    for i, row in enumerate(rows):
        values = [as_text(row[name]) for name in dict.fromkeys(template[1::2])]
        text, stop = made[i]["completion"], made[i]["stop"]
        found = compared(values, fill(template, row), text)
        made[i] |= found
        counts.update(numbers=len(numbers_in("\n".join(values))), lost=len(found["lost"]),
                      rows_lost=bool(found["lost"]), rows_added=bool(found["added"]),
                      rows_copied=found["copied"], rows_empty=not text.strip(),
                      rows_cut=stop == "length")
    return dict(counts)


def sentence(counts: dict[str, int]) -> str:
    """Say what judge() counted."""
    share = 100 * counts["lost"] / max(counts["numbers"], 1)
    return ("rewritten: {rows} rows; with lost numbers {rows_lost} ({lost} of {numbers} numbers, "
            "{share:.1f} %), with added ones {rows_added}; copies {rows_copied}, empty {rows_empty}"
            ", cut at the limit of tokens {rows_cut}").format(**counts, share=share)
