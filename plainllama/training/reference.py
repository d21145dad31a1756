"""The log-probabilities that the model of step 0 gives each document of a set of pairs, for DPO:
computed once and kept in the run's folder, so that no second model is in memory.

RUN/reference/ holds train.npy and val.npy, fp64 (documents,): log-probabilities summed over what is
learned, NaN for a document that no row shows; and made_of.json, which says of what model and data,
and is written last. Until then parts/ holds what is done.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import numpy as np
import torch

from plainllama.files import UNFINISHED, file_entry, read_json, sync, write_json
from plainllama.progress import Progress
from plainllama.settings import Settings, UserError, ceil_div, deciding
from plainllama.tokens.rows import FitRows, Rows, to_batch
from plainllama.training.engine import Engine
from plainllama.training.objectives import OBJECTIVES, log_probabilities
from plainllama.training.resume import Start
from plainllama.weights import peft

FOLDER, NOTE = "reference", "made_of.json"
CHUNK = 64  # rows of a part


def of_run(run: Path, engine: Engine, train: Rows, val: Rows, data_hash: str,
           start: Start) -> dict[str, np.ndarray]:
    """Read a run's reference, of each split (documents,), computed first what is missing of it if
    the run begins: only then the model is that of step 0. UserError if it is missing later, or of
    another model or data. Collective."""
    folder, world = run / FOLDER, engine.world
    splits = {"train": cast(FitRows, train), "val": cast(FitRows, val)}
    begins = not start.state
    made_of = {"data": data_hash, "block_size": engine.config.block_size}
    if begins:
        source = start.source or Path(engine.config.init_from)
        fixed = {key: getattr(engine.config, key) for key in deciding("fixed")}
        made_of |= {"model": world.decide(lambda: peft.model_sha256(source)), **fixed,
                    "dtype": str(engine.dtype)[6:], "seed": engine.config.seed}

    def look() -> bool:
        note = read_json(folder / NOTE, tolerant=True)
        names = [f"{split}.npy" for split in splits]
        whole = all((folder / name).is_file()
                    and file_entry(folder / name) == note.get("files", {}).get(name)
                    for name in names)
        other = {key: value for key, value in made_of.items()
                 if note.get("made_of", {}).get(key) != value}
        if not begins and (not whole or other):
            raise UserError(f"{folder} is missing, damaged or of another set: it holds what the "
                            "model of step 0 thought, which is gone; copy it too, or take another "
                            "out_dir")
        parts = folder / "parts"
        if (not whole and read_json(parts / NOTE, tolerant=True) != made_of) or (whole and other):
            shutil.rmtree(folder, ignore_errors=True)
            whole = False
        if not whole:
            parts.mkdir(parents=True, exist_ok=True)
            write_json(parts / NOTE, made_of)
        return whole

    if not world.decide(look):
        for split, rows in splits.items():
            compute(folder, split, engine, rows)
        world.decide(lambda: finish(folder, splits, made_of))
    return {split: np.load(folder / f"{split}.npy") for split in splits}


def known(reference: np.ndarray | None, rows: Rows, windows: Iterable[int]) -> np.ndarray | None:
    """Give the reference of the documents that windows hold (documents,), None without one."""
    if reference is None or not isinstance(rows, FitRows):
        return None
    return reference[rows.documents_of(windows)]


def stored(run: Path, split: str, data_hash: str, dtype: torch.dtype) -> np.ndarray | None:
    """Read the reference that a run has of a split of this data, by matmuls of `dtype`; None if it
    has none."""
    folder = run / FOLDER
    made_of = read_json(folder / NOTE, tolerant=True).get("made_of", {})
    there = made_of.get("data") == data_hash and made_of.get("dtype") == str(dtype)[6:]
    whole = there and (folder / f"{split}.npy").is_file()
    return np.load(folder / f"{split}.npy") if whole else None


def refuse_other_start(logged: dict[str, float], config: Settings, dtype: torch.dtype) -> None:
    """End a run whose first loss is not that of a model which is its own reference (dpo: ln 2).
    Beside other rows a pair's log-probabilities are rounded otherwise, by about 1e-7 in fp32."""
    first = OBJECTIVES[config.objective].first
    loss, size = logged["preference_loss"], abs(logged["logps/chosen"] + logged["logps/rejected"])
    most = 1e-6 + 1e-7 * config.preference_beta * size if dtype == torch.float32 else 0.02
    if first is not None and not abs(loss - first) <= most:  # or it is no number
        raise UserError(f"the first loss of {config.objective} is {loss:.7f}, not {first:.7f}: the "
                        "model is not its own reference; remove the run's reference/ and start "
                        "again")


def compute(folder: Path, split: str, engine: Engine, rows: FitRows) -> None:
    """Write the parts that a split lacks: (2, n), the documents of CHUNK rows and what the model
    thinks of each. Collective."""
    world = engine.world
    there = world.decide(lambda: {path.name for path in folder.glob("parts/*.npy")})
    progress = Progress(f"reference, {split}", rows.windows, "rows", world.rank == 0,
                        world.device.type)
    for number, first in enumerate(range(0, rows.windows, CHUNK)):
        windows = range(first, min(first + CHUNK, rows.windows))
        path = folder / "parts" / f"{split}-{number:05}.npy"
        if path.name not in there:
            made = world.gather(think(engine, rows, windows[world.rank::world.size],
                                      ceil_div(len(windows), world.size)))
            if world.rank == 0:
                temporary = path.with_name(path.name + UNFINISHED)
                with open(temporary, "wb") as file:
                    np.save(file, np.concatenate(made, 1))
                sync(temporary)
                temporary.replace(path)
        progress.add(len(windows))
    progress.close()
    world.reshard(engine.model)


@torch.no_grad()
def think(engine: Engine, rows: FitRows, windows: range, most: int) -> np.ndarray:
    """Compute the log-probabilities of what this rank's windows hold, at most `most`: fp64 (2, n),
    the documents and what the model thinks. As many passes on each rank."""
    found = []
    engine.model.eval()
    for first in range(0, most, engine.micro):
        mine = windows[first:first + engine.micro]
        batch = to_batch(rows.read_windows(mine), engine.micro, engine.bos_id)
        sums, *_ = log_probabilities(engine.module, batch, engine.world.device)
        found.append(np.stack([rows.documents_of(mine), sums.double().cpu().numpy()]))
    engine.model.train()
    return np.concatenate(found, 1)


def finish(folder: Path, splits: dict[str, FitRows], made_of: dict) -> None:
    """Join the parts, and then say that they are whole."""
    for split, rows in splits.items():
        values = np.full(rows.split.documents, np.nan)
        for path in folder.glob(f"parts/{split}-*.npy"):
            numbers, logps = np.load(path)
            values[numbers.astype(np.int64)] = logps
        if not np.isfinite(values[rows.documents_of(range(rows.windows))]).all():
            raise UserError("the model of init_from gives log-probabilities that are not "
                            "finite; take another")
        np.save(folder / f"{split}.npy", values)
        sync(folder / f"{split}.npy")
    entries = {f"{split}.npy": file_entry(folder / f"{split}.npy") for split in splits}
    write_json(folder / NOTE, {"format": 1, "made_of": made_of, "files": entries})
    shutil.rmtree(folder / "parts")
