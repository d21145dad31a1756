"""Answers beside references: BLEU, chrF, ROUGE, exact match and calls, each with its interval.

An answer, and each of the references that a row may have, is a message: `content`, and `tool_calls`
where it calls functions. The libraries count what matches; a score is always what they make of the
counts of all rows, and its interval what they make of rows that are drawn again, with replacement.
"""

import importlib.util
import itertools
import os
import unicodedata
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from plainllama.settings import UserError, install, nearest

TRIES, SEED = 1000, 12345  # resamples
BLEU_WORDS = 4  # BLEU is 0 where no text has so many words
SPACELESS = r"[\p{Han}\p{Hiragana}\p{Katakana}]"  # characters that are taken for words
# of scripts that put no spaces between words
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
Answers = list[dict]
References = list[list[dict]]  # of each row


class Measure(NamedTuple):
    """A metric of several rows: of each the counts, and the score that their sum gives."""

    name: str
    counts: np.ndarray  # (rows, k)
    score: Callable[[np.ndarray], float]
    signature: str = ""  # by which the library names what it did

    def interval(self) -> list[float]:
        """Give the bounds of 95 % of the scores of resampled rows."""
        rng, n = np.random.default_rng(SEED), len(self.counts)
        drawn = [self.score(self.counts[rng.integers(n, size=n)].sum(0)) for _ in range(TRIES)]
        return np.percentile(drawn, [2.5, 97.5]).tolist()


# ---- metrics

def library(name: str, answers: Answers, references: References, metric: Any) -> Measure:
    """Count by a metric of sacrebleu."""
    texts = [[reference["content"].strip() for reference in row] for row in references]
    counts = metric._extract_corpus_statistics(
        [answer["content"].strip() for answer in answers], [*itertools.zip_longest(*texts)])
    return Measure(name, np.array(counts), lambda total: metric._compute_score_from_stats(
        total.tolist()).score, str(metric.get_signature()))


def bleu(answers: Answers, references: References, tokenizer: str) -> list[Measure]:
    """Compute sacrebleu's BLEU, 0 to 100."""
    from sacrebleu.metrics import BLEU

    return [library("bleu", answers, references, BLEU(tokenize=tokenizer))]


def chrf(answers: Answers, references: References, _) -> list[Measure]:
    """Compute sacrebleu's chrF, 0 to 100."""
    from sacrebleu.metrics import CHRF

    return [library("chrf", answers, references, CHRF())]


class Words:
    """The words of ROUGE: letters, their marks and digits of any script; where characters are
    words, one by one. However an accent is written, and whatever the case."""

    def __init__(self):
        import regex

        words = rf"{SPACELESS}\p{{M}}*|(?:(?!{SPACELESS})[\p{{L}}\p{{M}}\p{{N}}])+"
        self.find = regex.compile(words).findall

    def tokenize(self, text: str) -> list[str]:
        """List the words of a text."""
        return self.find(unicodedata.normalize("NFC", text).casefold())


def rouge(answers: Answers, references: References, _) -> list[Measure]:
    """Compute rouge-score's F-measures, 0 to 1, with the reference that fits best."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeLsum"]
    scorer = RougeScorer(names, tokenizer=Words())
    found = [scorer.score_multi([reference["content"] for reference in row], answer["content"])
             for answer, row in zip(answers, references, strict=True)]
    return [mean_of(name, [row[name].fmeasure for row in found]) for name in names]


def exact(answers: Answers, references: References, _) -> list[Measure]:
    """Compute the share of answers that equal a reference, but for blanks at the ends."""
    return [mean_of("exact", [any(
        answer["content"].strip() == reference["content"].strip() and same_calls(answer, reference)
        for reference in row) for answer, row in zip(answers, references, strict=True)])]


def calls(answers: Answers, references: References, _) -> list[Measure]:
    """Compute the share of answers whose calls are those of a reference, and the share in which
    at least the names of the functions are."""
    def names(message: dict) -> list[str]:
        return [call["name"] for call in message.get("tool_calls", ())]

    pairs = list(zip(answers, references, strict=True))
    return [mean_of("calls", [any(same_calls(answer, reference) for reference in row)
                              for answer, row in pairs]),
            mean_of("call_names", [any(names(answer) == names(reference) for reference in row)
                                   for answer, row in pairs])]


def mean_of(name: str, values: list) -> Measure:
    """Make a metric of a value for each row, of which the score is the mean."""
    counts = np.array([[value, 1.0] for value in values])
    return Measure(name, counts, lambda total: float(total[0] / total[1]))


def same_calls(one: dict, other: dict) -> bool:
    """Whether two messages call the same functions with the same arguments, in this order."""
    return same(one.get("tool_calls", []), other.get("tool_calls", []))


def same(one: Any, other: Any) -> bool:
    """Whether two values are one in JSON, where 1 is 1.0 and not true."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


# name -> what computes it; to add one: a function, this entry, tests/test_generated.py
METRICS: dict[str, Callable[[Answers, References, str], list[Measure]]] = {
    "bleu": bleu, "chrf": chrf, "rouge": rouge, "exact": exact, "calls": calls}
NEEDS = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge": "rouge_score"}
FORCED = "bleu_tf"  # BLEU of what the model finds likeliest behind each token of the reference


# ---- what is asked for

def fitting(metric: str, references: References) -> list[int]:
    """List the rows that a metric is computed of: calls, of those whose references call; those of
    texts, of those whose references say something."""
    if metric == "exact":
        return list(range(len(references)))
    part = "tool_calls" if metric == "calls" else "content"
    return [i for i, row in enumerate(references)
            if all(reference.get(part, "") for reference in row)]


def chosen(asked: str, references: References, tokenizer: str) -> list[str]:
    """Read --metrics, names with commas between; '' chooses by the references. UserError for what
    is unknown, not installed or without a row."""
    known = [*METRICS, FORCED]
    names = [name.strip() for name in asked.split(",") if name.strip()]
    short = "bleu" not in names and FORCED not in names
    for name in names:
        if name not in known:
            raise UserError(f"--metrics takes {', '.join(known)}, not {name}{nearest(name, known)}")
    if not names:
        names = [name for name in METRICS if fitting(name, references)]
    for name in names:
        need_library(name)
        if not fitting(name, references):
            what = "calls a function" if name == "calls" else "has text"
            raise UserError(f"--metrics={name}: no reference {what}; leave it out")
    if {"bleu", FORCED} & set(names) and longest(references, tokenizer) < BLEU_WORDS:
        if not short:
            raise UserError(f"--metrics={asked}: BLEU counts runs of up to {BLEU_WORDS} words, and "
                            "no reference has as many, so it would be 0; take chrf or exact")
        names.remove("bleu")
        if os.environ.get("RANK", "0") == "0":
            print(f"no bleu: no reference has {BLEU_WORDS} words")
    return list(dict.fromkeys(names))


def need_library(name: str) -> None:
    """Raise UserError where a metric's library is not there."""
    package = NEEDS.get("bleu" if name == FORCED else name, "numpy")
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{name} needs {package.replace('_', '-')}: {install('generate')}; exact "
                        "and calls need nothing")


def longest(references: References, tokenizer: str) -> int:
    """Count the words of the longest reference, as BLEU does."""
    from sacrebleu.metrics import BLEU

    split = BLEU(tokenize=tokenizer)._preprocess_segment
    return max(len(split(reference["content"]).split()) for row in references for reference in row)


def tokenizer_for(references: References) -> str:
    """Choose a tokenizer of sacrebleu by the script of most letters: characters are words in
    Chinese (zh), and in other scripts that put no spaces between words (char)."""
    if importlib.util.find_spec("regex") is None:
        return "13a"  # of no metric that needs one
    import regex

    text = "\n".join(reference["content"] for row in references for reference in row)
    unspaced = regex.findall(UNSPACED, text)
    if 2 * len(unspaced) <= len(regex.findall(r"\p{L}", text)):
        return "13a"
    return "zh" if all(regex.match(r"\p{Han}", character) for character in unspaced) else "char"


# ---- scores

def scores(names: list[str], answers: Answers, forced: Answers, references: References,
           tokenizer: str) -> tuple[dict, dict[int, float]]:
    """Compute metrics of answers and, of FORCED, of what is likeliest behind the references: what
    eval/step_N.json holds, and {row: the score that it has alone, by the first metric}."""
    found: dict = {"intervals": {}, "signatures": {}}
    alone: dict[int, float] = {}
    for metric in names:
        given, kind, suffix = answers, metric, "_gen"
        if metric == FORCED:
            given, kind, suffix = forced, "bleu", "_tf"
        rows = fitting(kind, references)
        measures = METRICS[kind]([given[i] for i in rows], [references[i] for i in rows], tokenizer)
        for measure in measures:
            name = measure.name + suffix
            found[name] = measure.score(measure.counts.sum(0))
            found["intervals"][name] = measure.interval()
            if measure.signature:
                found["signatures"][name] = measure.signature
        if not alone and metric != FORCED:
            alone = {i: measures[0].score(counts)
                     for i, counts in zip(rows, measures[0].counts, strict=True)}
    return found, alone
