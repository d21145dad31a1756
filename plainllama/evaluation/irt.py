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

import contextlib
import importlib.util
import io
import json
import math
import os
import pickle
import urllib.request
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plainllama import settings
from plainllama.files import sha256_bytes
from plainllama.results import score_table
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
        """Give the object that the pickle names; UserError for one that is not admitted."""
        admitted = ADMITTED.get((module.replace("numpy._core", "numpy.core"), name))
        if admitted is None:
            raise UserError(f"it asks for {module}.{name}, and only numpy's arrays are admitted")
        return admitted


@dataclass
class Parameters:
    """The published parameters: n anchors among N questions, D dimensions of ability."""

    anchors: np.ndarray  # (n,) numbers of the questions, in tinyMMLU's order
    weights: np.ndarray  # (n,)
    a: np.ndarray  # (D, N)
    b: np.ndarray  # (D, N)
    balance: np.ndarray  # (N,)
    blend: np.ndarray  # ()

    def __post_init__(self):
        """UserError if the arrays do not fit together."""
        arrays, n, (D, N) = asdict(self).values(), len(self.anchors), self.a.shape
        shapes = [array.shape for array in arrays]
        if (shapes != [(n,), (n,), (D, N), (D, N), (N,), ()] or n == 0
                or len(set(self.anchors.tolist()) & set(range(N))) < n
                or not all(np.isfinite(array).all() for array in arrays)):
            raise UserError(f"not the parameters of n anchors among N questions: shapes {shapes}")

    def ability(self, right: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Fit the likeliest ability (D,) by BFGS from 0, without a prior, as the authors do."""
        from scipy.optimize import minimize

        def surprise(x: np.ndarray) -> float:
            p = curve(self.a[:, self.anchors], self.b[:, self.anchors], x)
            return -np.sum(times * np.log(np.where(right > 0, p, 1 - p) + 1e-10))

        return minimize(surprise, np.zeros(len(self.a)), method="BFGS").x

    def estimate(self, right: np.ndarray, times: np.ndarray | None = None) -> dict[str, float]:
        """Estimate {irt, pirt, gpirt} from answers (n,), 0 or 1 in tinyMMLU's order. `times`: how
        often a resample holds each."""
        right = np.asarray(right, float)
        times = np.ones(len(right)) if times is None else times
        weights, share = self.weights, len(self.anchors) / self.a.shape[1]
        irt = (weights * times * right).sum() * (weights.sum() / (weights * times).sum())
        seen = (self.balance[self.anchors] * times * right).sum() / times.sum()
        likely = self.balance * curve(self.a, self.b, self.ability(right, times))
        pirt = share * seen + (1 - share) * np.delete(likely, self.anchors).mean()
        return {"irt": float(irt), "pirt": float(pirt),
                "gpirt": float(self.blend * irt + (1 - self.blend) * pirt)}

    @cached_property
    def guessing(self) -> dict[str, list[float]]:
        """Estimate from the answers of models that guess among four letters."""
        answers = np.random.default_rng(0).random((50 * DRAWS, len(self.anchors))) < 1 / 4
        fitted = gathered([self.estimate(right) for right in answers[:DRAWS]])
        return fitted | {"irt": (answers @ self.weights).tolist()}  # cheap: more of them


def curve(a: np.ndarray, b: np.ndarray, ability: np.ndarray) -> np.ndarray:
    """Give P(right) of questions with the parameters a, b (D, m) for an ability (D,)."""
    return 1 / (1 + np.exp(-np.clip(a * ability[:, None] - b, -30, 30).sum(0)))


def gathered(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """Turn a list of dicts into a dict of lists."""
    return {name: [row[name] for row in rows] for name in rows[0]}


class Known(NamedTuple):
    """The parameters, or why they are unavailable here."""

    parameters: Parameters | None
    unavailable: str


def made_of(known: Known | None) -> dict[str, str]:
    """Hash the parameters that a task's estimates are made of; {} without them."""
    arrays = asdict(known.parameters) if known and known.parameters else {}
    data = b"".join(array.tobytes() for array in arrays.values())
    return {"irt": sha256_bytes(data)} if data else {}


# ---- scores

def scores(right: np.ndarray, known: tuple[Parameters | None, str]) -> dict:
    """Score answers (n,): {correct, irt, pirt, gpirt, intervals, guessing, unavailable}.

    intervals: name -> [low, high], which hold 95 % of the estimates from resampled questions.
    guessing: name -> mean, deviation, and the share of guessing models that reach 0.30. `known`:
    what load() gave; without parameters the accuracy's alone, and why the rest is unavailable.
    """
    (parameters, unavailable), n = known, len(right)
    if parameters and n != len(parameters.anchors):
        unavailable = f"they need the answers to all {len(parameters.anchors)} questions"
        parameters = None
    resamples = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), DRAWS).astype(float)
    resampled, guessing = {"acc": (resamples @ right / n).tolist()}, {"acc": guessed_accuracy(n)}
    metrics: dict = {"unavailable": f"irt, pirt, gpirt: {unavailable}"} if unavailable else {}
    if parameters:
        metrics |= parameters.estimate(right)
        resampled |= gathered([parameters.estimate(right, times) for times in resamples])
        for name, values in parameters.guessing.items():
            guessing[name] = {"mean": float(np.mean(values)), "deviation": float(np.std(values)),
                              "reaches_0.30": float(np.mean(np.array(values) >= REACHED))}
    intervals = {name: np.quantile(values, (0.025, 0.975)).tolist()
                 for name, values in resampled.items()}
    return metrics | {"correct": int(np.sum(right)), "intervals": intervals, "guessing": guessing}


def guessed_accuracy(n: int) -> dict[str, float]:
    """Say what guessing among four letters gives for n questions: a binomial distribution."""
    at_least = range(math.ceil(REACHED * n - 1e-9), n + 1)
    return {"mean": 1 / 4, "deviation": math.sqrt(3 / 16 / n),
            "reaches_0.30": sum(math.comb(n, k) * 3**(n - k) for k in at_least) / 4**n}


def letters(nats: list) -> dict[str, int]:
    """Count how often each letter was the likeliest, from every question's log-likelihoods."""
    likeliest = [int(np.argmax(row)) for row in nats]
    return {letter: likeliest.count(i) for i, letter in enumerate(LETTERS[:max(map(len, nats))])}


def answers(samples: list[dict], where: str) -> tuple[np.ndarray, dict]:
    """Read the samples that lm-eval keeps, of doc_id, acc or acc_norm, resps, target: 0 or 1 for
    each answer in document order, and {letters, loglikelihood} where they are told."""
    order = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    for place, number in enumerate(int(sample["doc_id"]) for sample in order):
        if number != place:
            raise UserError(f"{where} lacks doc_id {place}, or holds twice doc_id {number}")
    right = np.array([accuracy(sample) for sample in order])
    if not np.isin(right, (0, 1)).all():
        raise UserError(f"{where}: acc or acc_norm is not 0 or 1 everywhere")
    try:
        nats = [[float(response[0][0]) for response in sample["resps"]] for sample in order]
        of_target = [row[int(sample["target"])] for row, sample in zip(nats, order, strict=True)]
    except (ValueError, TypeError, KeyError, IndexError):
        return right, {}
    if not np.isfinite(np.concatenate(nats)).all():
        raise UserError(f"{where} holds likelihoods that are not finite: the model is broken")
    return right, {"loglikelihood": float(np.mean(of_target)), "letters": letters(nats)}


def accuracy(sample: dict) -> float:
    """Read the accuracy of one sample."""
    return float(sample["acc"] if "acc" in sample else sample["acc_norm"])


def read_samples(file: str) -> tuple[np.ndarray, dict]:
    """Read answers() from a samples_*.jsonl of lm_eval --log_samples or eval.py --log_samples."""
    if not Path(file).is_file():
        raise UserError(f"no file {file}; lm_eval --log_samples writes it as samples_*.jsonl")
    samples = []
    for number, line in enumerate(Path(file).read_bytes().splitlines(), 1):
        try:
            sample = json.loads(line)
            int(sample["doc_id"]), accuracy(sample)
            samples.append(sample)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{file}:{number}: not a sample with doc_id and acc or acc_norm "
                            f"({error!r})") from None
    if not samples:
        raise UserError(f"{file} holds no samples")
    return answers(samples, file)


def score_samples(file: str, parameters_file: str, as_json: bool) -> int:
    """Score tinyMMLU from the samples in a file and print that; `parameters_file`: as for load().
    The exit code."""
    right, told = read_samples(file)
    known = load(parameters_file)
    if known.parameters and len(right) != (n := len(known.parameters.anchors)):
        raise UserError(f"{file} holds {len(right)} answers, tinyMMLU has {n} questions")
    metrics: dict = {"acc": float(right.mean()), "chance": 1 / 4, "n": len(right)}
    metrics |= told | scores(right, known)
    print(score_table(f"{file}, {len(right)} prompts", metrics))
    if as_json:
        print(json.dumps(metrics))
    return 0


# ---- the parameters

def load(file: str = "") -> Known:
    """Read the parameters from `file`, a copy of the published pickle or an .npz with the fields of
    Parameters, else from the cache, else fetch them. UserError for a file that is neither."""
    if not importlib.util.find_spec("scipy"):
        return Known(None, f"scipy is not installed; {settings.install('eval')}")
    if file and not Path(file).is_file():
        raise UserError(f"no file {file}; it is to be a copy of {URL}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plainllama"
    kept, copy = cache / "tinyMMLU-irt.npz", cache / URL.rpartition("/")[2]
    if file or kept.is_file():
        return Known(read(Path(file or kept)), "")
    try:
        parameters = None if copy.is_file() else fetch()
    except (OSError, ValueError, UserError) as error:
        place = str(copy).replace(str(Path.home()), "~", 1)  # this is kept with the scores
        return Known(None, f"{error}; fetch {URL} to {place} or name a copy with --irt-file")
    parameters = parameters or read(copy)
    with contextlib.suppress(OSError):  # where there is no place, they are fetched again
        cache.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}.tmp.npz")
        np.savez(part, **asdict(parameters))
        os.replace(part, kept)
    return Known(parameters, "")


def fetch() -> Parameters:
    """Fetch the published parameters. OSError without a network, UserError if they are others."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise OSError("HF_HUB_OFFLINE is set")
    with urllib.request.urlopen(URL, timeout=20) as answer:
        return from_pickle(answer.read(1 << 26))


def read(path: Path) -> Parameters:
    """Read the parameters in an .npz or the published pickle; UserError if they are not there."""
    data = path.read_bytes()
    try:
        if data[:2] != b"PK":  # not a zip, which an .npz is
            return from_pickle(data)
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return Parameters(**{field.name: arrays[field.name] for field in fields(Parameters)})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a broken zip, array or pickle raises almost anything
        raise UserError(f"{path} does not hold the parameters: {error!r}") from None


def from_pickle(data: bytes) -> Parameters:
    """Read the parameters of mmlu in the published pickle; its hash is checked before it is
    opened."""
    digest = sha256_bytes(data)
    if digest != SHA256:
        raise UserError(f"it was not opened: its sha256 is {digest}, the published one is {SHA256}")
    table = NumpyOnly(io.BytesIO(data)).load()["mmlu"]
    [(name, questions)] = table["scenarios_position"].items()
    total, subjects = int(np.max(questions)) + 1, table["subscenarios_position"][name].values()
    balance = np.ones(total)
    for subject in subjects:
        balance[np.asarray(subject)] = len(questions) / (len(subjects) * len(subject))
    a, b = (np.asarray(table["irt_parameters"][key], float)[0] for key in "AB")
    return Parameters(
        np.asarray(table["seen_examples"], int), np.asarray(table["examples_weights"][name]),
        a, b, balance, np.asarray(table["optimal_lambdas"][name], float))
