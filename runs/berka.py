"""What a small model of clients' rows adds to sums made by hand: python runs/berka.py FOLDER

Three public tables, which FOLDER holds as .csv or .csv.xz: accounts of a Czech bank before they
take a loan (Berka, PKDD'99: berka_transactions, berka_unlabelled, berka_labels; is the loan paid
badly?), purchases at a shop of CDs (CDNOW, Fader and Hardie: cdnow; does a customer of 1997 come
back in 1998?) and six monthly statements of credit cards (UCI 350, Yeh 2009: uci_credit_default; is
the next payment missed?). Of the last two, CLIENTS are taken.

For each, a model of 0.4 million parameters learns to write the rows of clients, never their
labels; its states are then probed (eval.py --probe) alone and beside sums made by hand, against
these sums alone and against the states of a model that has learned nothing. Arms differ in how the
same rows are written: words or codes, and in which format. Every arm has the same --seeds, each a
model and folds of its own (runs/seeds.py). Results: OUT/table.md and OUT/results.json; a second use
goes on where the first was stopped.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plainllama.command import CommandLine, parse_arguments, run_command
from plainllama.files import read_json, write_json, write_text
from plainllama.settings import UserError, key


@dataclass
class Flags:
    """What runs/berka.py takes."""

    seeds: str = key("1,2,3,4,5", "seeds, with commas between")
    clients: int = key(4000, "clients taken of cdnow and of uci_credit_default", low=100)
    steps: int = key(100, "updates of every model", low=10)
    arms: str = key("", "only these arms, with commas between")
    out: str = key("out/berka", "folder for runs and results")


if __name__ == "__main__":
    COMMAND = parse_arguments(__doc__, Flags, takes="files")

import csv
import datetime
import itertools
import lzma
import random
import subprocess
from collections.abc import Iterator
from statistics import mean, pstdev
from typing import NamedTuple

from plainllama.report.compare import spread

# arm: table, format, whether codes have their words, whether what has learned nothing is beside
ARMS = {"berka": ("berka", "plain", True, True), "cdnow": ("cdnow", "plain", True, True),
        "credit": ("credit", "plain", True, True), "berka-codes": ("berka", "plain", False, False),
        "credit-codes": ("credit", "plain", False, False),
        "credit-json": ("credit", "json", True, False),
        "berka-json": ("berka", "json", True, False)}
CONFIG = '''"""Made by runs/berka.py."""

dataset = "{arm}"
documents = "table"
sources = {{"path": {rows!r}, "id": "client", "time": "date", "format": {form!r},
           "columns": {columns!r}}}
tokenizer = "bpe:512"
val_fraction = 0.05
max_dropped = 0.0

n_layer = 3
n_head = 4
d_model = 96
d_ff = 256
block_size = 1024

global_batch_tokens = 8 * 1024
max_steps = {steps}
optimizer = "muon"
learning_rate = 2.5e-3
min_lr = 0.0
schedule = "linear"
warmup_steps = 20
eval_interval = {steps}
eval_tokens = 16 * 1024
save_interval = {steps}
sample_tokens = 0
'''
STATES = ("sample.py --ckpt {of} --embed=mean --layers=1: --prompts data/ARM "
          "--out {of}/states.parquet")
RECIPE = f"""prepare.py {{config}}
train.py {{config}} --seed={{seed}} --out_dir={{run}}
{STATES.replace("{of}", "{run}")}
"""
UNTRAINED = f"""train.py {{config}} --seed={{seed}} --out_dir={{run}}/untrained --max_steps=1 \
--warmup_steps=0 --learning_rate=1e-9 --eval_tokens=1024
{STATES.replace("{of}", "{run}/untrained")}
"""
PROBE = """eval.py --probe --embeddings {run}/states.parquet,SUMS --against RIVALS --labels LABELS \
--id client --label label --seeds={seed} --ckpt {run}
"""


class Table(NamedTuple):
    """Rows of clients, and what they are asked about."""

    columns: list[dict]  # as `columns` of a source, with words
    rows: list[list]  # client, date, then the other columns
    labels: dict[int, int]
    own: dict[int, dict[str, float]]  # client -> what is known besides of it


def main(command: CommandLine) -> int:
    """Make the tables, run every arm and print what came of it."""
    flags: Flags = command.flags  # type: ignore[assignment]
    if len(command.files) != 1 or not Path(command.files[0]).is_dir():
        raise UserError("name the folder that holds the tables")
    out, arms = Path(flags.out), flags.arms.split(",") if flags.arms else [*ARMS]
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise UserError(f"no arm {unknown[0]}; there are {', '.join(ARMS)}")
    for name in dict.fromkeys(ARMS[arm][0] for arm in arms):
        if not (out / name / "sums.csv").exists():
            write_table(out / name, TABLES[name](Path(command.files[0]), flags.clients))
    for arm in arms:
        name, form, words, untrained = ARMS[arm]
        home = out / name
        columns = read_json(home / "columns.json")["columns"]
        shown = [column if words else {key: value for key, value in column.items()
                                       if key != "words"} for column in columns]
        config, recipe = out / f"{arm}.py", out / f"{arm}.txt"
        write_text(config, CONFIG.format(arm=arm, rows=str(home / "rows.csv"), form=form,
                                         columns=shown, steps=flags.steps))
        rivals = [f"{home}/sums.csv", "{run}/states.parquet",
                  *(["{run}/untrained/states.parquet"] if untrained else [])]
        text = RECIPE + (UNTRAINED if untrained else "") + PROBE
        write_text(recipe, text.replace("ARM", arm).replace("SUMS", f"{home}/sums.csv").replace(
            "RIVALS", ",".join(rivals)).replace("LABELS", f"{home}/labels.csv"))
        done = subprocess.run([sys.executable, str(ROOT / "runs/seeds.py"), str(config),
                               f"--seeds={flags.seeds}", f"--recipe={recipe}",
                               f"--out={out / arm}"])
        if done.returncode:
            return done.returncode
    told(out, [arm for arm in ARMS if (out / arm / "results.json").exists()])
    return 0


# ---- what came of it

def told(out: Path, arms: list[str]) -> None:
    """Write and print the scores of the arms, each a mean over seeds, and what of them differs
    seed by seed."""
    of: dict[str, dict[str, list[float]]] = {}
    for arm in arms:
        sums = f"{out / ARMS[arm][0]}/sums.csv"
        found = read_json(out / arm / "results.json")["scores"]
        own, both = "states.parquet", f"states.parquet,{sums}"
        names = {"sums": (sums, ""), "untrained": (f"untrained/{own}", ""), "states": (own, ""),
                 "both": (both, ""), "both - sums": (both, f" minus {sums}"),
                 "shuffled": (both, "_shuffled")}
        of[arm] = {name: [*found[full].values()] for name, (files, suffix) in names.items()
                   if (full := f"probe:{files} label auroc{suffix}") in found}
    lines = ["AUROC, mean over seeds ± 95 % interval of Student's t", "",
             "| arm | sums by hand | untrained states | states | states and sums | the last less "
             "the first | shuffled labels | seeds |", "|---" * 8 + "|"]
    for arm, scores in of.items():
        cells = [spread(scores[name]) if name in scores else "" for name in (
            "sums", "untrained", "states", "both", "both - sums", "shuffled")]
        lines.append(f"| {' | '.join([arm, *cells, str(len(scores['states']))])} |")
    lines += ["", "| states alone, seed by seed | difference |", "|---|---|"]
    for arm in of:
        first = ARMS[arm][0]
        if "untrained" in of[arm]:
            lines.append(f"| {arm}, trained less untrained | "
                         f"{spread(less(of[arm]['states'], of[arm]['untrained']))} |")
        if arm != first and first in of:
            lines.append(f"| {first} less {arm} | "
                         f"{spread(less(of[first]['states'], of[arm]['states']))} |")
    print("\n".join(lines), flush=True)
    write_text(out / "table.md", "\n".join(lines) + "\n")
    write_json(out / "results.json", of)


def less(values: list[float], others: list[float]) -> list[float]:
    """Subtract, seed by seed."""
    return [value - other for value, other in zip(values, others, strict=False)]


# ---- the tables

def read(folder: Path, name: str) -> Iterator[dict]:
    """Read the rows of a table."""
    path = next((path for ending in (".csv", ".csv.xz")
                 if (path := folder / f"{name}{ending}").is_file()), None)
    if path is None:
        raise UserError(f"{folder} has no {name}.csv and no {name}.csv.xz")
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", newline="") as file:
        yield from csv.DictReader(file)


def codes_of(rows: list[list], column: int) -> dict[str, str]:
    """Replace the words of a column by codes, C1 for the most frequent; return their words."""
    words = [row[column] for row in rows if row[column]]
    order = sorted(dict.fromkeys(words), key=lambda word: (-words.count(word), word))
    codes = {word: f"C{number}" for number, word in enumerate(order, 1)}
    for row in rows:
        row[column] = codes.get(row[column], "")
    return {code: word for word, code in codes.items()}


def berka(folder: Path, count: int) -> Table:
    """All movements of the accounts; those with a label end before their loan."""
    rows = []
    for row in itertools.chain(read(folder, "berka_transactions"),
                               read(folder, "berka_unlabelled")):
        day = datetime.datetime.strptime(row["date"], "%y%m%d").date()
        rows.append([int(row["account_id"]), day, row["type"], row["operation"], row["k_symbol"],
                     float(row["amount"]), float(row["balance"])])
    columns: list[dict] = [{"column": "date"}, *(
        {"column": name, "words": codes_of(rows, at)}
        for at, name in enumerate(("type", "operation", "purpose"), 2)),
        {"column": "amount", "unit": "CZK", "decimals": 0},
        {"column": "balance", "unit": "CZK", "decimals": 0}]
    labels = {int(row["account_id"]): int(row["bad"]) for row in read(folder, "berka_labels")}
    return Table(columns, rows, labels, {})


def cdnow(folder: Path, count: int) -> Table:
    """Purchases of 1997; the label is whether there is one in 1998."""
    rows: list[list] = [
        [int(row["customer_id"]), datetime.date.fromisoformat(row["date"]), int(row["quantity"]),
         float(row["price"])] for row in read(folder, "cdnow")]
    later = {row[0] for row in rows if row[1].year > 1997}
    rows = [row for row in rows if row[1].year == 1997]
    taken = {*chosen(sorted({row[0] for row in rows}), count)}
    columns: list[dict] = [{"column": "date"}, {"column": "quantity", "name": "discs"},
               {"column": "price", "unit": "USD", "decimals": 2}]
    return Table(columns, [row for row in rows if row[0] in taken],
                 {client: int(client in later) for client in sorted(taken)}, {})


def credit(folder: Path, count: int) -> Table:
    """Six monthly statements, the oldest first; the label is the next payment missed."""
    words = {"-2": "nothing used", "-1": "paid in full", "0": "minimum paid", **{
        str(months): f"{months} months late" for months in range(1, 10)}, "1": "1 month late"}
    rows, labels, own = [], {}, {}
    clients = {int(row["ID"]): row for row in read(folder, "uci_credit_default")}
    for client in chosen(sorted(clients), count):
        row = clients[client]
        labels[client] = int(row.pop("default.payment.next.month"))
        own[client] = {name: float(value) for name, value in row.items() if name != "ID"}
        for month, pay in zip(range(1, 7), ("6", "5", "4", "3", "2", "0"), strict=True):
            rows.append([client, datetime.date(2005, month + 3, 28), row[f"PAY_{pay}"],
                         *(float(row[f"{what}{7 - month}"]) for what in ("BILL_AMT", "PAY_AMT")),
                         float(row["LIMIT_BAL"])])
    columns: list[dict] = [
        {"column": "date", "name": "statement"}, {"column": "status", "words": words},
        *({"column": name, "unit": "TWD", "decimals": 0} for name in ("bill", "paid", "limit"))]
    return Table(columns, rows, labels, own)


TABLES = {"berka": berka, "cdnow": cdnow, "credit": credit}


def chosen(clients: list[int], count: int) -> list[int]:
    """Choose some clients, always the same."""
    return sorted(random.Random(1).sample(clients, min(count, len(clients))))


def write_table(home: Path, table: Table) -> None:
    """Write rows, labels, sums and what the columns are; the sums last."""
    home.mkdir(parents=True, exist_ok=True)
    names = [column["column"] for column in table.columns]
    write_csv(home / "rows.csv", [["client", *names], *table.rows])
    write_csv(home / "labels.csv", [["client", "label"], *table.labels.items()])
    write_json(home / "columns.json", {"columns": table.columns})
    of: dict[int, list[list]] = {client: [] for client in table.labels}
    for row in sorted(table.rows, key=lambda row: row[1]):
        if row[0] in of:
            of[row[0]].append(row)
    numbers = [at for at, value in enumerate(table.rows[0]) if isinstance(value, int | float)][1:]
    kinds = {at: sorted({row[at] for row in table.rows}) for at, value in enumerate(table.rows[0])
             if isinstance(value, str)}
    end = max(row[1] for row in table.rows)
    sums = {client: sums_of(rows, numbers, kinds, end) | table.own.get(client, {})
            for client, rows in of.items()}
    write_csv(home / "sums.csv", [["client", *next(iter(sums.values()))], *(
        [client, *(f"{value:.6g}" for value in own.values())] for client, own in sums.items())])


def sums_of(rows: list[list], numbers: list[int], kinds: dict[int, list[str]],
            end: datetime.date) -> dict[str, float]:
    """Add up by hand what a client did: how much, when, of each kind how often and for how much,
    and the newest of all."""
    days = [row[1].toordinal() for row in rows]
    gaps = [later - day for day, later in itertools.pairwise(days)] or [0]
    found = {"rows": len(rows), "days": days[-1] - days[0], "since": end.toordinal() - days[-1],
             "begun": end.toordinal() - days[0], "gap": mean(gaps), "gap_sd": pstdev(gaps),
             "gap_max": max(gaps)}
    for at in numbers:
        values, late = [row[at] for row in rows], [
            row[at] for row in rows if row[1].toordinal() > days[-1] - 90]
        found |= {f"{at}_sum": sum(values), f"{at}_mean": mean(values), f"{at}_sd": pstdev(values),
                  f"{at}_min": min(values), f"{at}_max": max(values), f"{at}_first": values[0],
                  f"{at}_last": values[-1], f"{at}_90_mean": mean(late), f"{at}_90_min": min(late)}
    for at, each in kinds.items():
        for kind in each:
            own = [row for row in rows if row[at] == kind]
            found |= {f"{at}={kind}": len(own),
                      f"{at}={kind}_sum": sum(row[numbers[0]] for row in own)}
    return found


def write_csv(path: Path, rows: list) -> None:
    """Write a .csv."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


if __name__ == "__main__":
    run_command(main, COMMAND)
