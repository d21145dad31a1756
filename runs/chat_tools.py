"""The two functions that the dialogs of embedded:chat call: sample.py --chat --tools=FILE."""

import datetime
import operator

OPERATIONS = {"plus": operator.add, "minus": operator.sub, "times": operator.mul}


def calculator(expression: str) -> str:
    """Work out a sum."""
    first, operation, second = expression.split()  # "2 plus 3"
    return str(OPERATIONS[operation](int(first), int(second)))


def weekday(date: str) -> str:
    """Name the day of a date."""
    return f"{datetime.date.fromisoformat(date):%A}"
