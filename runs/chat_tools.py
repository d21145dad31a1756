"""The two functions that the dialogs of embedded:chat call: sample.py --chat --tools=FILE."""

import datetime
import operator

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def calculator(expression: str) -> str:
    """Work out a sum, a difference or a product of two whole numbers."""
    first, sign, second = expression.split()
    return str(OPERATIONS[sign](int(first), int(second)))


def weekday(date: str) -> str:
    """Say which day of the week a date, written as 2001-12-31, is."""
    return f"{datetime.date.fromisoformat(date):%A}"
