"""irt.py: tinyMMLU's estimates against formulas written a second time, and its parameter file."""

import hashlib
import io
import json
import math
import os
import pickle
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import eval
from plainllama.command import parse
from plainllama.evaluation import irt
from plainllama.settings import UserError

N, D, SUBJECTS = 400, 3, 7


@pytest.fixture(scope="module")
def published() -> dict:
    """A table in the form of the published one, with other numbers."""
    chance = np.random.default_rng(5)
    subjects = np.split(chance.permutation(N), np.sort(chance.choice(N, SUBJECTS - 1, False)))
    weights = chance.dirichlet(np.full(100, 4.0))
    return {"lb": "not read", "mmlu": {
        "seen_examples": chance.choice(N, 100, False).tolist(),
        "examples_weights": {"mmlu": weights}, "optimal_lambdas": {"mmlu": np.float64(0.4)},
        "irt_parameters": {"A": chance.normal(0.6, 0.5, (1, D, N)),
                           "B": chance.normal(0.1, 0.5, (1, D, N))},
        "scenarios_position": {"mmlu": list(range(N))},
        "subscenarios_position": {"mmlu": {f"s{i}": part.tolist()
                                           for i, part in enumerate(subjects)}}}}


@pytest.fixture
def pickled(published, tmp_path, monkeypatch) -> Path:
    """The table as a file that has the hash of the published one."""
    path = tmp_path / "given.pkl"
    path.write_bytes(pickle.dumps(published))
    believe(monkeypatch, path.read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return path


def believe(monkeypatch, data: bytes) -> None:
    """Take the hash of these bytes for the published one."""
    monkeypatch.setattr(irt, "SHA256", hashlib.sha256(data).hexdigest())


def plainly(answers, table: dict) -> dict:
    """The three estimates, question by question."""
    from scipy.optimize import minimize

    a, b = (table["irt_parameters"][key][0].T for key in "AB")  # (N, D)
    seen, n = table["seen_examples"], len(table["scenarios_position"]["mmlu"])
    given = dict(zip(seen, answers, strict=True))

    def p(question: int, theta) -> float:
        return 1 / (1 + math.exp(-sum(max(-30, min(30, u * t - v)) for u, t, v in
                                      zip(a[question], theta, b[question], strict=True))))

    def surprise(theta) -> float:
        return -sum(math.log((p(j, theta) if y else 1 - p(j, theta)) + 1e-10)
                    for j, y in given.items())

    theta = minimize(surprise, np.zeros(a.shape[1]), method="BFGS").x
    parts = table["subscenarios_position"]["mmlu"].values()
    balance = {j: n / (len(parts) * len(part)) for part in parts for j in part}
    irt = sum(w * y for w, y in zip(table["examples_weights"]["mmlu"], answers, strict=True))
    here = sum(balance[j] * y for j, y in given.items()) / 100
    there = [balance[j] * p(j, theta) for j in range(n) if j not in given]
    pirt = 100 / n * here + (1 - 100 / n) * sum(there) / len(there)
    blend = table["optimal_lambdas"]["mmlu"]
    return {"irt": irt, "pirt": pirt, "gpirt": blend * irt + (1 - blend) * pirt}


def test_estimates_equal_the_formulas(pickled, published):
    parameters, lacking = irt.load(str(pickled))
    chance = np.random.default_rng(1)
    assert parameters and not lacking
    for share in (0.05, 0.25, 0.25, 0.5, 0.8):
        answers = (chance.random(100) < share).astype(float)
        assert parameters.estimate(answers) == pytest.approx(
            plainly(answers, published["mmlu"]), abs=1e-6)
    twice = np.zeros(100)
    twice[:50] = 2  # a resample that holds the first half twice
    first = parameters.estimate(answers, twice)["irt"]
    weights = parameters.weights
    assert first == pytest.approx((weights * answers)[:50].sum() / weights[:50].sum())


def test_what_is_told_beside_the_estimates(pickled, monkeypatch):
    monkeypatch.setattr(irt, "DRAWS", 40)
    right = np.arange(100) % 10 < 3
    known = irt.load(str(pickled))
    found = irt.scores(right, known)
    assert found["correct"] == 30 and "unavailable" not in found
    for name in ("irt", "pirt", "gpirt"):
        low, high = found["intervals"][name]
        assert low < found[name] < high and 0.02 < (high - low) / 3.92 < 0.08
    guess = found["guessing"]["irt"]
    spread = math.sqrt(3 / 16 * (known[0].weights**2).sum())
    assert guess["mean"] == pytest.approx(0.25, abs=0.01)
    assert guess["deviation"] == pytest.approx(spread, rel=0.1)
    by_normal = 0.5 * math.erfc(0.05 / spread / math.sqrt(2))
    assert guess["reaches_0.30"] == pytest.approx(by_normal, abs=0.04)
    assert found["guessing"]["acc"]["reaches_0.30"] == pytest.approx(0.1495, abs=1e-4)
    fewer = irt.scores(right[:50], known)
    assert "irt" not in fewer and "all 100 questions" in fewer["unavailable"]
    alone = irt.scores(right, (None, "no network"))
    assert alone["correct"] == 30 and alone["unavailable"] == "irt, pirt, gpirt: no network"
    assert set(alone["intervals"]) == set(alone["guessing"]) == {"acc"}


# ---- the parameter file

class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, word: str):
        self.word = word

    def __reduce__(self):
        return os.system, (self.word,)


def test_a_pickle_that_runs_code_is_stopped_with_its_name(published, tmp_path, monkeypatch):
    mark, path = tmp_path / "ran", tmp_path / "evil.pkl"
    data = pickle.dumps(published | {"lb": Evil(f"touch '{mark}'")})
    path.write_bytes(data)
    with pytest.raises(UserError, match="was not opened: its sha256 is"):
        irt.load(str(path))
    believe(monkeypatch, data)  # even if it had the right hash
    with pytest.raises(UserError, match=r"asks for (posix|nt)\.system"):
        irt.load(str(path))
    assert not mark.exists()
    pickle.loads(data)
    assert mark.exists()  # the file does what it is meant to
    for other in (print, pickle.loads, np.load, Path("x"), io.BytesIO(b"x")):
        data = pickle.dumps(other)
        path.write_bytes(data)
        believe(monkeypatch, data)
        with pytest.raises(UserError, match="only numpy's arrays are admitted"):
            irt.load(str(path))


@pytest.mark.parametrize("spoil, said", [
    (lambda table: table.pop("mmlu"), "KeyError"),
    (lambda table: table["mmlu"].update(seen_examples=[1, 1]), "not the parameters"),
    (lambda table: table["mmlu"]["irt_parameters"].update(A=np.ones((1, 2, N))), "shapes"),
    (lambda table: table["mmlu"]["irt_parameters"]["B"].fill(np.nan), "not the parameters")])
def test_a_table_of_another_form_is_refused(published, tmp_path, monkeypatch, spoil, said):
    table = pickle.loads(pickle.dumps(published))
    spoil(table)
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(table))
    believe(monkeypatch, path.read_bytes())
    with pytest.raises(UserError, match=said):
        irt.load(str(path))


def test_an_npz_with_objects_is_refused(tmp_path):
    mark = tmp_path / "ran"
    np.savez(tmp_path / "p.npz", anchors=np.array([Evil(f"touch '{mark}'")], object))
    with pytest.raises(UserError, match="does not hold the parameters"):
        irt.load(str(tmp_path / "p.npz"))
    assert not mark.exists()


def test_it_is_fetched_once_and_kept_as_npz(pickled, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    asked = []

    def opened(url, timeout):
        asked.append(url)
        return io.BytesIO(pickled.read_bytes())

    monkeypatch.setattr(urllib.request, "urlopen", opened)
    answers = np.arange(100) % 3 == 0
    first = irt.load()[0].estimate(answers)
    kept = tmp_path / "cache" / "plainllama" / "tinyMMLU-irt.npz"
    assert irt.load()[0].estimate(answers) == first and asked == [irt.URL]
    assert irt.load(str(kept))[0].estimate(answers) == first
    kept.unlink()
    pickled.rename(kept.with_name("tinyBenchmarks.pkl"))  # put there by hand
    assert irt.load()[0].estimate(answers) == first and len(asked) == 1 and kept.exists()
    kept.write_bytes(kept.read_bytes()[:999])
    with pytest.raises(UserError, match="does not hold the parameters"):
        irt.load()


def test_without_a_network_the_file_and_its_place_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    parameters, lacking = irt.load()
    assert parameters is None and irt.URL in lacking and "--irt-file" in lacking
    assert str(tmp_path / "plainllama" / "tinyBenchmarks.pkl") in lacking
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"<html>"))
    assert "was not opened: its sha256" in irt.load()[1]
    with pytest.raises(UserError, match="no file nowhere"):
        irt.load("nowhere")


# ---- answers that others have kept

def sample(i: int, right: bool) -> dict:
    """A row as lm_eval --log_samples writes it for tinyMMLU."""
    target = i % 4
    resps = [[[str(-3.0 + (letter == (target if right else (target + 1) % 4))), "False"]]
             for letter in range(4)]
    return {"doc_id": i, "target": str(target), "resps": resps, "filter": "none",
            "acc_norm": float(right)}


def test_samples_are_taken_in_the_order_of_their_questions(pickled, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(irt, "DRAWS", 4)
    rows = [sample(i, i % 7 < 2) for i in range(100)]
    mixed = [*rows[::2], *rows[1::2]]  # as two ranks of lm-eval leave them
    path = tmp_path / "samples_tinyMMLU.jsonl"
    path.write_text("\n".join(map(json.dumps, mixed)) + "\n")
    words = [f"--irt={path}", f"--irt-file={pickled}", "--json"]
    assert eval.main(parse(words, "", eval.Flags, "files")) == 0
    shown = capsys.readouterr().out
    found = json.loads(shown.splitlines()[-1])
    right = np.array([i % 7 < 2 for i in range(100)])
    expected = irt.load(str(pickled))[0].estimate(right)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["acc"] == right.mean() and found["loglikelihood"] == pytest.approx(
        -3 + right.mean())
    assert found["letters"] == {letter: sum((i + (i % 7 >= 2)) % 4 == n for i in range(100))
                                for n, letter in enumerate("ABCD")}
    assert "30 of 100" in shown and "guessing" in shown and "predicted" in shown


@pytest.mark.parametrize("rows, said", [
    (["{"], ":1: not a sample"), (['{"doc_id": 0}'], ":1: not a sample"), ([], "no samples"),
    ([json.dumps(sample(i, True)) for i in (0, 2)], "lacks doc_id 1"),
    ([json.dumps(sample(i, True)) for i in (0, 1, 1)], "holds twice doc_id 1"),
    ([json.dumps(sample(0, True) | {"acc_norm": 0.5})], "not 0 or 1"),
    ([json.dumps(sample(i, True)) for i in range(9)], "9 answers, tinyMMLU has 100")])
def test_samples_that_are_not_all_there(pickled, tmp_path, rows, said):
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join(rows))
    with pytest.raises(UserError, match=said):
        eval.main(parse([f"--irt={path}", f"--irt-file={pickled}"], "", eval.Flags,
                                    "files"))


# ---- to the last digit

def few(**changes) -> irt.Parameters:
    """Three anchors among five questions, one dimension."""
    arrays = {"anchors": np.array([4, 0, 2]), "weights": np.array([0.5, 0.3, 0.2]),
              "a": np.array([[1.0, 2, 0.5, 1, 1]]), "b": np.array([[0.0, 1, -1, 0.5, 0.2]]),
              "balance": np.array([1.0, 2, 1, 0.5, 0.5]), "blend": np.array(0.25)} | changes
    return irt.Parameters(**arrays)


@pytest.mark.parametrize("changes", [
    {"anchors": np.array([4, 0, 0])}, {"anchors": np.array([4, 0, 5])},
    {"anchors": np.array([4, 0, -1])}, {"anchors": np.array([], int), "weights": np.array([])},
    {"weights": np.ones(2)}, {"b": np.ones((2, 5))}, {"balance": np.ones(4)},
    {"blend": np.ones(1)}, {"blend": np.array(np.inf)}, {"balance": np.full(5, np.nan)}])
def test_parameters_that_do_not_fit_together_are_none(changes):
    assert few().anchors.tolist() == [4, 0, 2]
    with pytest.raises(UserError, match="not the parameters of n anchors among N questions"):
        few(**changes)


def test_resamples_and_guesses_are_these_draws(monkeypatch):
    monkeypatch.setattr(irt, "DRAWS", 8)
    known, right = few(), np.array([1, 0, 1])
    times = np.random.default_rng(0).multinomial(3, np.full(3, 1 / 3), 8)
    found = irt.scores(right, (known, ""))
    each = [known.estimate(right, row.astype(float)) for row in times]
    for name in ("irt", "pirt", "gpirt"):
        assert found[name] == known.estimate(right)[name]
        assert found["intervals"][name] == pytest.approx(
            np.quantile([one[name] for one in each], [0.025, 0.975]).tolist())
    accuracies = (times * right).sum(1) / 3
    assert found["intervals"]["acc"] == np.quantile(accuracies, [0.025, 0.975]).tolist()
    guessed = np.random.default_rng(0).random((400, 3)) < 0.25
    values = guessed @ known.weights
    assert found["guessing"]["irt"] == {
        "mean": pytest.approx(values.mean()), "deviation": pytest.approx(values.std()),
        "reaches_0.30": np.mean(values >= 0.3)}
    values = np.array([known.estimate(row)["pirt"] for row in guessed[:8]])
    assert found["guessing"]["pirt"] == {
        "mean": pytest.approx(values.mean()), "deviation": pytest.approx(values.std()),
        "reaches_0.30": np.mean(values >= 0.3)}
    assert found["guessing"].keys() == {"acc", "irt", "pirt", "gpirt"}
    monkeypatch.undo()
    times = np.random.default_rng(0).multinomial(3, np.full(3, 1 / 3), 200)
    assert irt.scores(right, (None, "x"))["intervals"]["acc"] == np.quantile(
        (times * right).sum(1) / 3, [0.025, 0.975]).tolist()


@pytest.mark.parametrize(("n", "least"), [(1, 1), (4, 2), (10, 3), (11, 4), (100, 30)])
def test_guessing_is_a_binomial_distribution(n, least):
    from scipy import stats

    found = irt.guessed_accuracy(n)
    assert found == {"mean": 0.25, "deviation": pytest.approx(stats.binom.std(n, 0.25) / n),
                     "reaches_0.30": pytest.approx(stats.binom.sf(least - 1, n, 0.25))}


def test_a_curve_ends_at_thirty_in_each_dimension():
    a, b = np.array([[40.0, -40, 40], [1, 1, -40]]), np.zeros((2, 3))
    sums = np.array([30 + 1, -30 + 1, 0])
    found = irt.curve(a, b, np.array([1.0, 1.0]))
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-sums)), rtol=1e-12)
    np.testing.assert_allclose(1 - found[:1], np.exp(-31) / (1 + np.exp(-31)), rtol=1e-2)


def test_letters_and_likelihoods_of_samples():
    assert irt.letters([[0.0, 1, 2], [5, 1], [0, 3, 1]]) == {"A": 1, "B": 1, "C": 1}
    rows = [{"doc_id": "1", "acc": 0, "acc_norm": 1, "target": 1,
             "resps": [[["-1", 0]], [["-2", 0]]]},
            {"doc_id": 0, "acc": 1.0, "target": "0", "resps": [[[-3, 0]], [[-4, 0]]]}]
    right, told = irt.answers(rows, "x")
    assert right.tolist() == [1, 0]  # acc goes before acc_norm
    assert told == {"loglikelihood": -2.5, "letters": {"A": 2, "B": 0}}
    for target in ("x", None, 2):  # nothing is told beside the answers
        told = irt.answers([rows[0], rows[1] | {"target": target}], "x")[1]
        assert told == {}
    with pytest.raises(UserError, match="x: acc or acc_norm is not 0 or 1 everywhere"):
        irt.answers([rows[0], rows[1] | {"acc": 2}], "x")


def test_what_a_task_is_made_of_are_the_arrays():
    known, other = few(), few(blend=np.array(0.5))
    assert irt.made_of(None) == irt.made_of(irt.Known(None, "no network")) == {}
    data = b"".join(getattr(known, name).tobytes()
                    for name in ("anchors", "weights", "a", "b", "balance", "blend"))
    assert irt.made_of(irt.Known(known, "")) == {"irt": hashlib.sha256(data).hexdigest()}
    assert irt.made_of(irt.Known(other, "")) != irt.made_of(irt.Known(known, ""))


def test_where_scipy_or_the_network_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, tried in (("0", True), ("", True), ("1", False), ("yes", False)):
        asked = []

        def opened(url, timeout, asked=asked):
            asked.append((url, timeout))
            raise OSError("no network")

        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        monkeypatch.setattr(urllib.request, "urlopen", opened)
        why = irt.load().unavailable
        assert why.startswith("no network; fetch " if tried else "HF_HUB_OFFLINE is set; fetch ")
        assert asked == ([(irt.URL, 20)] if tried else [])
        assert why.endswith(" to ~/.cache/plainllama/tinyBenchmarks.pkl or name a copy with "
                            "--irt-file")
    monkeypatch.setattr(irt.importlib.util, "find_spec", lambda name: None)
    assert irt.load() == (None, "scipy is not installed; python -m pip install -c constraints.txt "
                                "-e '.[eval]'")


def test_a_cache_that_cannot_be_written_is_no_error(pickled, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(urllib.request, "urlopen",
                        lambda *_, **__: io.BytesIO(pickled.read_bytes()))
    (tmp_path / "cache").write_text("a file")
    assert irt.load().parameters.a.shape == (D, N)
    (tmp_path / "cache").unlink()
    assert irt.load().unavailable == ""
    [kept] = (tmp_path / "cache/plainllama").iterdir()  # nothing half written
    assert kept.name == "tinyMMLU-irt.npz"


def test_a_table_becomes_these_arrays(pickled, published):
    found, table = irt.read(pickled), published["mmlu"]
    assert found.anchors.tolist() == table["seen_examples"]
    assert found.weights.tolist() == table["examples_weights"]["mmlu"].tolist()
    assert (found.a == table["irt_parameters"]["A"][0]).all()
    assert (found.b == table["irt_parameters"]["B"][0]).all() and found.blend == 0.4
    for part in table["subscenarios_position"]["mmlu"].values():  # each subject counts alike
        assert found.balance[part].sum() == pytest.approx(N / SUBJECTS)
