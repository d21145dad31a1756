"""The transactions of `embedded:table`, made by a seed, with a planted signal: which clients will
leave is told by the order of what they do, and hardly by how often or for how much.

Each client has a habit, for good. One that stays goes from the grocery to the bakery and from the
fuel station to the car wash four times in five; one that leaves the other way round. Both do as
much of each, so that counts and sums by category say nothing; a leaving client's amounts are lower
by a tenth, which is the little that sums show. One label in twenty is wrong.

    python -m plainllama.text.embedded_table labels.csv sums.csv

writes the labels (client,leaves) and, if a second name is there, what a bank would add up by hand:
of each client how many transactions there are, in all and by category, and their amounts.
"""

import csv
import datetime
import random
import sys
from collections.abc import Iterator
from statistics import mean
from typing import IO

COUNT, SEED = 3000, 1
# merchant category codes, in pairs that follow each other, and those that stand alone
WORDS = {5411: "grocery", 5462: "bakery", 5541: "fuel", 7542: "car wash", 6011: "cash",
         5912: "pharmacy", 5812: "restaurant", 4111: "transport"}
PAIRS, ALONE, USUAL = [(5411, 5462), (5541, 7542)], [6011, 5912, 5812, 4111], 0.8
LOWER, WRONG, MISSING = 0.9, 0.05, 0.02  # a leaving client's amounts; labels; amounts unknown


def clients(count: int = COUNT, seed: int = SEED) -> Iterator[tuple[int, bool, list[tuple]]]:
    """Make clients: number, whether it leaves, and its transactions (date, code, amount), the
    oldest first."""
    draw = random.Random(seed)
    for number in range(1, count + 1):
        leaves, day, events = draw.random() < 0.5, datetime.date(2023, 1, 1), []
        for _ in range(draw.randint(12, 20)):
            first, second = draw.choice(PAIRS)
            if leaves != (draw.random() > USUAL):
                first, second = second, first
            for code in (first, second, *draw.sample(ALONE, draw.randint(0, 1))):
                day += datetime.timedelta(draw.randint(1, 4))
                amount = draw.lognormvariate(3, 0.8) * (LOWER if leaves else 1)
                events.append((day, code, "" if draw.random() < MISSING else f"{amount:.2f}"))
        yield number, leaves != (draw.random() < WRONG), events


def write_rows(file: IO[bytes]) -> None:
    """Write all transactions as a .csv, by day: as a bank keeps them."""
    rows = [(day, number, code, amount) for number, _, events in clients()
            for day, code, amount in events]
    file.write(b"date,client,mcc,amount\n")
    file.writelines(",".join(map(str, row)).encode() + b"\n" for row in sorted(rows))


def write_labels(path: str) -> None:
    """Write which clients leave."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("client", "leaves"), *(
            (number, int(leaves)) for number, leaves, _ in clients())])


def write_sums(path: str) -> None:
    """Write counts and amounts of each client."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["client", "count", "sum", "mean", "greatest", *WORDS.values()])
        for number, _, events in clients():
            amounts = [float(amount) for _, _, amount in events if amount]
            codes = [code for _, code, _ in events]
            table.writerow([number, len(events), f"{sum(amounts):.2f}", f"{mean(amounts):.4f}",
                            f"{max(amounts):.2f}", *map(codes.count, WORDS)])


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("python -m plainllama.text.embedded_table labels.csv [sums.csv]")
    write_labels(sys.argv[1])
    if len(sys.argv) == 3:
        write_sums(sys.argv[2])
