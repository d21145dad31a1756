"""The two functions that the dialogs of embedded:chat call: sample.py --chat --tools=FILE."""

import datetime
import operator

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def calculator(expression: str) -> str:
    """Work out a sum."""
    first, sign, second = expression.split()
    return str(OPERATIONS[sign](int(first), int(second)))


def weekday(date: str) -> str:
    """Name the day of a date."""
    return f"{datetime.date.fromisoformat(date):%A}"
