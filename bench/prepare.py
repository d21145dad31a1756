"""How fast prepare.py is, on one core: python bench/prepare.py [CORPUS] [--tokenizers FOLDER]

CORPUS is a folder of .jsonl files (packed or not) or one file, read up to --megabytes of text;
without it the embedded text is taken. For gpt2 and mistral, from uncompressed .jsonl, whole
commands in turn, --repeat times:

  ours           python prepare.py: start-up, checks, hashes and a verified data set on disk
  bare           its reader and its engine with nothing written
  sentencepiece  json.loads and the library's own encode, nothing written (mistral)
  datasets       map(encode) and one memory map written in 1,024 slices: the usual way

FOLDER may hold gpt2/vocab.bpe and a .model of mistral; else installed packages do.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plainllama.text.documents import Tally, documents
from plainllama.text.sources import survey
from plainllama.tokens import tokenizer, vocabulary


def bare(text: str, where: str) -> None:
    """The reader and the engine alone."""
    words, batch, size = tokenizer.Tokenizer.load(where), [], 0
    _, parts = survey(text)
    for document in documents(parts, Tally()):
        batch.append(document)
        size += len(document)
        if size > 1 << 20:
            words.encode_documents(batch)
            batch, size = [], 0
    words.encode_documents(batch)


def sentencepiece(text: str, where: str) -> None:
    """Sentencepiece's own encode."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=f"{where}/own.model")
    with open(text, encoding="utf-8") as file:
        for line in file:
            model.encode(json.loads(line)["text"])


def datasets(text: str, where: str) -> None:
    """datasets.map(encode), then a memory map written slice by slice."""
    import datasets
    import numpy as np

    datasets.disable_progress_bars()
    words = tokenizer.Tokenizer.load(where)

    def process(row: dict) -> dict:
        ids = words.encode_documents([row["text"]])[0]
        return {"ids": ids, "len": len(ids)}

    with tempfile.TemporaryDirectory() as cache:
        rows = datasets.load_dataset("json", data_files=text, split="train", cache_dir=cache)
        done = rows.map(process, remove_columns=rows.column_names)
        data = np.memmap(f"{cache}/train.bin", np.uint16, "w+", shape=(sum(done["len"]),))
        at, slices = 0, min(1024, len(done))
        for i in range(slices):
            piece = done.shard(slices, i, contiguous=True).with_format("numpy")
            ids = np.concatenate(piece["ids"])
            data[at:at + len(ids)] = ids
            at += len(ids)
        data.flush()


def gather(corpus: str, megabytes: float, path: Path) -> float:
    """Write the corpus as uncompressed .jsonl; its megabytes of text."""
    size, budget = 0, megabytes * 1e6
    pattern = f"{corpus}/train*.jsonl*" if os.path.isdir(corpus) else corpus
    _, parts = survey(pattern)
    with open(path, "w", encoding="utf-8") as file:
        for text in documents(parts, Tally()):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode())
            if size >= budget:
                break
    return size / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="?", default="embedded")
    parser.add_argument("--tokenizers", default="")
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)  # one measured process
    options = parser.parse_args()
    if options.side:
        {"bare": bare, "sentencepiece": sentencepiece, "datasets": datasets}[options.side[0]](
            *options.side[1:])
        return
    with tempfile.TemporaryDirectory() as name:
        home, folder = Path(name), Path(options.tokenizers)
        size = gather(options.corpus, options.megabytes, home / "text.jsonl")
        print(f"{size:.1f} MB of text, one core")
        for kind in ("gpt2", "mistral"):
            (home / kind).mkdir()
            models = sorted(folder.glob("*.model")) if options.tokenizers else []
            if kind == "mistral":
                own = models[0].read_bytes() if models else vocabulary.published(
                    "tokenizer.model", vocabulary.MISTRAL, [])
                (home / kind / "own.model").write_bytes(own)
                words = tokenizer.make_tokenizer(str(home / kind / "own.model"))
            else:
                words = tokenizer.make_tokenizer(kind, search=[folder / kind])
            words.save(home / kind)
            measure(home, kind, size, options.repeat)


def measure(home: Path, kind: str, size: float, repeat: int) -> None:
    """Run all sides in turn, print medians and ratios."""
    sides = ["ours", "bare", "datasets", *(["sentencepiece"] if kind == "mistral" else [])]
    text, where = str(home / "text.jsonl"), str(home / kind)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    busy: dict[str, list[float]] = {side: [] for side in sides}
    core = max(os.sched_getaffinity(0))
    for trial in range(repeat):
        for side in sides:
            words = [str(Path(__file__).resolve()), "--side", side, text, where]
            if side == "ours":
                # in a file: for a text of the command line a run's speed would be measured, too
                (home / "text.py").write_text(f"sources = {text!r}\n")
                words = [str(ROOT / "prepare.py"), "text.py", f"--tokenizer={where}",
                         "--workers=1", f"--dataset={kind}{trial}"]
            began, used = time.perf_counter(), cpu_seconds()
            subprocess.run([sys.executable, *words], cwd=home, check=True, capture_output=True,
                           env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
                           preexec_fn=lambda: os.sched_setaffinity(0, {core}))
            seconds[side].append(time.perf_counter() - began)
            busy[side].append(cpu_seconds() - used)
    speed = {side: size / statistics.median(times) for side, times in seconds.items()}
    print(f"{kind}: MB a second of processor time, which other programs disturb less: " + ", ".join(
        f"{side} {size / statistics.median(times):.2f}" for side, times in busy.items()))
    for side in sides[1:]:
        shown = "its reader and engine alone" if side == "bare" else side
        print(f"| prepare {kind}, MB/s on one core | {speed['ours']:.2f} | {shown} "
              f"{speed[side]:.2f} | {speed['ours'] / speed[side]:.2f} |", flush=True)


def cpu_seconds() -> float:
    """Processor time of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
