"""From the hundred answers of tinyMMLU to an estimate for the whole of MMLU.

The hundred questions ("anchors") were chosen so that their weighted accuracy is close to that on
all 14,042 (https://arxiv.org/abs/2402.14992). The weights, and an item response model of every
question, are published as one file, which is read here with nothing but numpy's arrays admitted.

irt     sum of w_i y_i over the anchors: an accuracy with weights, in spite of its name
pirt    (n/N) mean over the anchors of balance_j y_j
        + (1 - n/N) mean over all other questions of balance_j p_j(ability)
gpirt   blend irt + (1 - blend) pirt, which lm-eval prints as tinyMMLU's acc_norm

p_j(ability) = sigmoid(sum_d clip(a_dj ability_d - b_dj, -30, 30)); the ability is that under which
the hundred answers are likeliest; balance_j makes each of the 57 subjects count alike.
"""

import hashlib
import io
import json
import math
import os
import pickle
import urllib.request
from collections import Counter
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from plainllama import settings
from plainllama.settings import UserError

URL = ("https://raw.githubusercontent.com/felipemaiapolo/tinyBenchmarks/main/tinyBenchmarks/"
       "tinyBenchmarks.pkl")
SHA256 = "c3b6e426dfe7b100fe6d0ee960398e10a8763254bcead3be80cc6bc15abca284"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
REACHED = 0.30  # a score that looks like more than chance
DRAWS = 200  # of resamples, and of guessers: each fits an ability
# what a pickled array asks for; numpy 2 says numpy._core
multiarray = np.ones(1).__reduce__()[0]
ADMITTED = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "_reconstruct"): multiarray,
            ("numpy.core.multiarray", "scalar"): np.float64(1).__reduce__()[0],
            ("numpy.core.numeric", "_frombuffer"): np.ones(1).__reduce_ex__(5)[0]}


class NumpyOnly(pickle.Unpickler):
    """Builds containers, numbers, texts and numpy's arrays; whatever else is asked for by name
    stops it before anything of it has run."""

    def find_class(self, module: str, name: str):
        """The object that the pickle names."""
        try:
            return ADMITTED[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            raise UserError(f"the pickle asks for {module}.{name}, and only numpy's arrays are "
                            "admitted; nothing of it was run") from None


@dataclass
class Parameters:
    """The published parameters: n anchors among N questions, D dimensions of ability."""

    anchors: np.ndarray  # (n,) numbers of the questions, in tinyMMLU's order
    weights: np.ndarray  # (n,)
    a: np.ndarray  # (D, N)
    b: np.ndarray  # (D, N)
    balance: np.ndarray  # (N,)
    blend: np.ndarray  # ()

    def check(self, where: str) -> "Parameters":
        """Itself; UserError if the arrays do not fit together."""
        n, total = len(self.anchors), self.a.shape[-1]
        if not (self.weights.shape == (n,) and self.a.shape == self.b.shape and self.a.ndim == 2
                and self.balance.shape == (total,) and self.blend.shape == ()
                and len(set(self.anchors.tolist())) == n and min(self.anchors, default=-1) >= 0
                and max(self.anchors) < total and all(
                    np.isfinite(getattr(self, field.name)).all() for field in fields(self))):
            raise UserError(f"{where}: these are not the parameters of n anchors among N "
                            "questions, shapes " + ", ".join(
                                f"{field.name} {getattr(self, field.name).shape}"
                                for field in fields(self)))
        return self

    def curve(self, ability: np.ndarray, which) -> np.ndarray:
        """P(right) of the questions `which` for an ability (D,)."""
        z = np.clip(self.a[:, which] * ability[:, None] - self.b[:, which], -30, 30).sum(0)
        return 1 / (1 + np.exp(-z))

    def ability(self, right: np.ndarray, times: np.ndarray) -> np.ndarray:
        """The likeliest ability (D,), by BFGS from 0 without a prior, as the authors fit it."""
        from scipy.optimize import minimize

        a, b = (x[:, self.anchors][None] for x in (self.a, self.b))

        def surprise(x: np.ndarray) -> float:
            z = np.clip(a * x.reshape(1, -1, 1) - b, -30, 30).sum(axis=1)
            p = (1 / (1 + np.exp(-z))).squeeze()
            return -np.sum(times * (right * np.log(p + 1e-10)
                                    + (1 - right) * np.log(1 - p + 1e-10)))

        return minimize(surprise, np.zeros(len(self.a)), method="BFGS").x

    @cached_property
    def others(self) -> np.ndarray:
        """The questions that are no anchors."""
        return np.setdiff1d(np.arange(self.a.shape[1]), self.anchors)

    def estimate(self, right: np.ndarray, times: np.ndarray | None = None) -> dict[str, float]:
        """{irt, pirt, gpirt} of answers (n,), 0 or 1 in tinyMMLU's order. `times`: how often a
        resample holds each."""
        right = np.asarray(right, float)
        times = np.ones(len(right)) if times is None else times
        w, share = self.weights, len(self.anchors) / self.a.shape[1]
        irt = (w * times * right).sum() * (w.sum() / (w * times).sum())
        seen = (self.balance[self.anchors] * times * right).sum() / times.sum()
        likely = self.curve(self.ability(right, times), self.others)
        pirt = share * seen + (1 - share) * (self.balance[self.others] * likely).mean()
        blend = float(self.blend)
        return {"irt": float(irt), "pirt": float(pirt),
                "gpirt": float(blend * irt + (1 - blend) * pirt)}

    @cached_property
    def guessing(self) -> dict[str, list[float]]:
        """The estimates of models that guess among four letters."""
        answers = np.random.default_rng(0).random((50 * DRAWS, len(self.anchors))) < 1 / 4
        fitted = gathered([self.estimate(right) for right in answers[:DRAWS]])
        return fitted | {"irt": (answers @ self.weights).tolist()}  # cheap: more of them


def gathered(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """A list for each key."""
    return {name: [row[name] for row in rows] for name in rows[0]}


# ---- scores

def scores(right: np.ndarray, known: "tuple[Parameters | None, str]") -> dict:
    """The scores of answers (n,): {correct, irt, pirt, gpirt, intervals, guessing, unavailable}.

    intervals: name -> [low, high], which hold 95 % of the estimates from resampled questions.
    guessing: name -> mean, deviation, and the share of guessing models that reach 0.30. `known`:
    what load() gave; without parameters the accuracy's alone, and why the rest is unavailable.
    """
    (parameters, lacking), n = known, len(right)
    if parameters and n != (every := len(parameters.anchors)):
        parameters, lacking = None, f"they need the answers to all {every} questions"
    at_least = range(math.ceil(REACHED * n - 1e-9), n + 1)
    found: dict = {"correct": int(np.sum(right)), "intervals": {}, "guessing": {"acc": {
        "mean": 1 / 4, "deviation": math.sqrt(3 / 16 / n),
        "reaches_0.30": sum(math.comb(n, k) * 3**(n - k) for k in at_least) / 4**n}}}
    chance = np.random.default_rng(0)
    times = chance.multinomial(n, np.full(n, 1 / n), DRAWS).astype(float)
    resampled = {"acc": (times @ right / n).tolist()}
    if parameters:
        found = parameters.estimate(right) | found
        resampled |= gathered([parameters.estimate(right, one) for one in times])
        for name, values in parameters.guessing.items():
            found["guessing"][name] = {
                "mean": float(np.mean(values)), "deviation": float(np.std(values)),
                "reaches_0.30": float(np.mean(np.array(values) >= REACHED))}
    for name, values in resampled.items():
        found["intervals"][name] = np.quantile(values, (0.025, 0.975)).tolist()
    return found | ({"unavailable": f"irt, pirt, gpirt: {lacking}"} if lacking else {})


def letters(likely: list[list[float]]) -> dict[str, int]:
    """How often each letter was the likeliest, of the log-likelihoods of every question's."""
    counts = Counter(row.index(max(row)) for row in likely)
    return {letter: counts[i] for i, letter in enumerate(LETTERS[:max(map(len, likely))])}


def answers(samples: list[dict], where: str) -> tuple[np.ndarray, dict]:
    """(0 or 1 for each answer in document order, {letters, loglikelihood} where they are told) of
    the samples that lm-eval keeps: doc_id, acc or acc_norm, resps, target."""
    order = sorted(samples, key=lambda one: int(one["doc_id"]))
    for place, one in enumerate(order):
        if int(one["doc_id"]) != place:
            what = "lacks" if int(one["doc_id"]) > place else "holds twice"
            raise UserError(f"{where} {what} doc_id {place if what == 'lacks' else place - 1}")
    right = np.array([float(one["acc"] if "acc" in one else one["acc_norm"]) for one in order])
    if not np.isin(right, (0, 1)).all():
        raise UserError(f"{where}: acc or acc_norm is not 0 or 1 everywhere")
    try:
        likely = [[float(resp[0][0]) for resp in one["resps"]] for one in order]
        told = [row[int(one["target"])] for row, one in zip(likely, order, strict=True)]
    except (ValueError, TypeError, KeyError, IndexError):
        return right, {}
    return right, {"loglikelihood": float(np.mean(told)), "letters": letters(likely)}


def read_samples(file: str) -> tuple[np.ndarray, dict]:
    """answers() of a samples_*.jsonl that lm_eval --log_samples or eval.py --log_samples wrote."""
    if not Path(file).is_file():
        raise UserError(f"no file {file}; lm_eval --log_samples writes it as samples_*.jsonl")
    rows = []
    for number, line in enumerate(Path(file).read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            int(row["doc_id"]), float(row["acc"] if "acc" in row else row["acc_norm"])
            rows.append(row)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file}:{number}: not a sample with doc_id and acc or acc_norm "
                            f"({error!r})") from None
    if not rows:
        raise UserError(f"{file} holds no samples")
    return answers(rows, file)


# ---- the parameters

def load(file: str = "") -> tuple[Parameters | None, str]:
    """(the parameters, '') or (None, why they cannot be had here). UserError if `file`, a copy of
    the published pickle or an .npz with the fields of Parameters, is not what it must be."""
    try:
        import scipy  # noqa: F401
    except ImportError:
        return None, f"scipy is not installed; {settings.install('eval')}"
    if file:
        if not Path(file).is_file():
            raise UserError(f"no file {file}; it is to be a copy of {URL}")
        return read(Path(file)), ""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plainllama"
    kept, copy = cache / "tinyMMLU-irt.npz", cache / URL.rpartition("/")[2]
    if kept.is_file() or copy.is_file():
        found = read(kept if kept.is_file() else copy)
    else:
        try:
            if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
                raise OSError("HF_HUB_OFFLINE is set")
            with urllib.request.urlopen(URL, timeout=20) as answer:
                found = from_pickle(answer.read(1 << 26), URL)
        except (OSError, ValueError, UserError) as error:
            place = str(copy).replace(str(Path.home()), "~", 1)  # this is kept with the scores
            return None, f"{error}; fetch {URL} and put it at {place}, or name it with --irt-file"
    if not kept.is_file():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            part = kept.with_suffix(f".{os.getpid()}.tmp.npz")
            np.savez(part, **{field.name: getattr(found, field.name) for field in fields(found)})
            os.replace(part, kept)
        except OSError:  # no place to keep it: fetched again next time
            pass
    return found, ""


def read(path: Path) -> Parameters:
    """The parameters in a file."""
    data = path.read_bytes()
    if data[:2] != b"PK":  # not a zip, which an .npz is
        return from_pickle(data, str(path))
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            found = {field.name: arrays[field.name] for field in fields(Parameters)}
        return Parameters(**found).check(str(path))
    except UserError:
        raise
    except Exception as error:  # zip, header or an array of it may be broken
        raise UserError(f"{path} does not hold the parameters: {error!r}") from None


def from_pickle(data: bytes, where: str) -> Parameters:
    """The parameters of mmlu in the published pickle, its hash checked before it is opened."""
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        raise UserError(f"{where} was not opened: its sha256 is {digest}, that of the published "
                        f"file is {SHA256}")
    try:
        table = NumpyOnly(io.BytesIO(data)).load()["mmlu"]
        [(name, questions)] = table["scenarios_position"].items()
        total, subjects = int(np.max(questions)) + 1, table["subscenarios_position"][name].values()
        balance = np.ones(total)
        for subject in subjects:
            balance[np.asarray(subject)] = len(questions) / (len(subjects) * len(subject))
        a, b = (np.asarray(table["irt_parameters"][key], float)[0] for key in "AB")
        return Parameters(
            np.asarray(table["seen_examples"], int), np.asarray(table["examples_weights"][name]),
            a, b, balance, np.asarray(table["optimal_lambdas"][name], float)).check(where)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:  # a broken pickle raises almost anything
        raise UserError(f"{where} does not hold mmlu's parameters: {error!r}") from None
