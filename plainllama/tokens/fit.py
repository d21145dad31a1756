"""Whole documents -> rows with little padding: best fit decreasing."""

import numpy as np


def best_fit(sizes: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Put units of `sizes` (n,), each from 1 to `room`, into rows that hold `room`: by falling
    size, each into the fullest row that still takes it (D. S. Johnson, "Near-optimal bin packing
    algorithms", 1973).

    Returns the units row by row (n,), and where each row begins among them (rows,). A unit
    takes constant time: a whole number has a bit for each free space that some row has, and the
    lowest one that is large enough is found by arithmetic. Equal sizes keep their order.
    """
    order = np.argsort(-sizes, kind="stable")
    rows_with: list[list[int]] = [[] for _ in range(room + 1)]  # by their free space
    spaces, count = 0, 0
    rows = np.empty(len(sizes), np.int64)  # of the units in their order
    for place, size in enumerate(sizes[order].tolist()):
        enough = spaces >> size
        if enough:
            space = size + (enough & -enough).bit_length() - 1
            row = rows_with[space].pop()
            if not rows_with[space]:
                spaces ^= 1 << space
        else:
            row, space, count = count, room, count + 1
        rows[place] = row
        rows_with[space - size].append(row)
        spaces |= 1 << (space - size)
    by_row = np.argsort(rows, kind="stable")
    return order[by_row], np.searchsorted(rows[by_row], np.arange(count))
