"""eval.py --probe: against scikit-learn, LightGBM and scipy in a script by hand; files and how they
are joined; what is refused; where the scores go."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
from test_sample import tiny, write_checkpoint

import eval
import sample
from plainllama import results
from plainllama.command import parse
from plainllama.evaluation import probe, vectors
from plainllama.files import file_entry, read_json, write_json
from plainllama.report import page
from plainllama.report.runs import RunFolder
from plainllama.settings import UserError

pa = pytest.importorskip("pyarrow")
pytest.importorskip("lightgbm")
pytest.importorskip("sklearn")
import pyarrow.parquet as pq  # noqa: E402

N, D = 160, 5


def run(*words) -> int:
    """eval.py --probe in this process."""
    asked = parse(["--probe", *map(str, words)], None, eval.Flags, "files")
    return eval.main(asked)


def told(*words) -> dict:
    """The tasks that it writes."""
    assert run(*words, "--out=o.json") == 0
    return read_json(eval.Path("o.json"))["tasks"]


def write_csv(path: str, **columns) -> None:
    rows = zip(*columns.values(), strict=True)
    text = "".join(",".join("" if cell is None else str(cell) for cell in row) + "\n"
                   for row in rows)
    eval.Path(path).write_text(",".join(columns) + "\n" + text)


def write_embeddings(path: str, ids, values: np.ndarray) -> None:
    """As sample.py --embed does, with a column of the rows' own."""
    flat = pa.FixedSizeListArray.from_arrays(values.astype("f4").ravel(), values.shape[1])
    pq.write_table(pa.table({"id": ids, "prompt": ["x"] * len(ids), "embedding": flat}), path)


@pytest.fixture
def few(monkeypatch):
    """Fits of 15 trees instead of 500."""
    monkeypatch.setitem(probe.PARAMETERS, "n_estimators", 15)


@pytest.fixture
def data(tmp_path, monkeypatch) -> dict:
    """Vectors of shuffled ids with a planted signal, two classes and three, aggregates that know
    less, 40 test ids."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "cores", lambda: 1)
    draw = np.random.default_rng(5)
    ids = draw.permutation(N) + 1
    x = draw.normal(size=(N, D)).astype("f4")
    two = (x[:, 0] + 0.2 * draw.normal(size=N) > 0.3).astype(int)
    three = np.digitize(x[:, 1], [-0.6, 0.2])
    write_embeddings("e.parquet", ids, x)
    write_csv("l.csv", id=ids, label=two, three=three)
    less = x[:, 0] + 1.5 * draw.normal(size=N)
    write_csv("hand.csv", id=ids[::-1], sums=less[::-1], name=["n"] * N, label=two[::-1])
    write_csv("t.csv", id=ids[:40])
    return {"ids": ids, "x": x, "two": two, "three": three, "less": less}


BASIC = ("--embeddings=e.parquet", "--labels=l.csv")


def by_hand(x, y, test, seed=42, trees=500) -> tuple[list, list]:
    """Scores of the folds and of the test set, by the libraries alone; rows in order of their
    ids."""
    from lightgbm import LGBMClassifier
    from sklearn.metrics import accuracy_score, roc_auc_score
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MaxAbsScaler

    inner_x, inner_y, valid_scores, test_scores = x[~test], y[~test], [], []
    for train, valid in StratifiedKFold(5, shuffle=True, random_state=seed).split(inner_x, inner_y):
        model = make_pipeline(MaxAbsScaler(), LGBMClassifier(
            n_estimators=trees, learning_rate=0.02, max_depth=6, num_leaves=63, subsample=0.5,
            subsample_freq=1, feature_fraction=0.75, lambda_l1=1, lambda_l2=1, deterministic=True,
            force_row_wise=True, n_jobs=1, random_state=seed, verbose=-1))
        model.fit(inner_x[train], inner_y[train])
        for scores, some_x, some_y in ((valid_scores, inner_x[valid], inner_y[valid]),
                                       (test_scores, x[test], y[test])):
            if len(some_y):
                scores.append(roc_auc_score(some_y, model.predict_proba(some_x)[:, 1])
                              if y.max() == 1 else accuracy_score(some_y, model.predict(some_x)))
    return valid_scores, test_scores


# ---- scores

def test_it_is_a_script_by_hand_to_the_last_digit(data, capsys):
    from scipy import stats

    tasks = told(*BASIC, "--against=hand.csv", "--test_ids=t.csv")
    order = np.argsort(data["ids"])
    test = np.isin(data["ids"], data["ids"][:40])[order]
    y, found = data["two"][order], tasks["probe:e.parquet label"]
    rival = tasks["probe:hand.csv label"]
    assert (found["n"], found["tested"], found["label"]) == (N - 40, 40, "label")
    expected = {}
    for x, theirs in ((data["x"][order], found), (data["less"][order, None], rival)):
        valid, fixed = by_hand(x, y, test)
        assert theirs["folds"]["auroc"] == valid
        assert theirs["folds"]["auroc_test"] == fixed
        expected[len(expected)] = np.array([valid, fixed])
    for fold in range(5):  # labels are shuffled anew for each
        mixed = y.copy()
        mixed[~test] = np.random.default_rng([42, fold]).permutation(y[~test])
        score = by_hand(data["x"][order], mixed, test)[0][fold]
        assert found["folds"]["auroc_shuffled"][fold] == score
    less = expected[0] - expected[1]  # paired: the same folds
    assert found["folds"]["auroc minus hand.csv"] == less[0].tolist()
    assert found["folds"]["auroc_test minus hand.csv"] == less[1].tolist()
    for name, values in found["folds"].items():
        low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
        assert found[name] == pytest.approx((low + high) / 2, abs=1e-12)
        assert found["margins"][name] == pytest.approx((high - low) / 2, abs=1e-12)
    assert found["chances"] == dict.fromkeys(("auroc", "auroc_test", "auroc_shuffled"), 0.5)
    assert found["auroc"] > 0.9 and found["auroc_test"] > 0.9  # the planted signal
    assert abs(found["auroc_shuffled"] - 0.5) < 0.15 < found["auroc minus hand.csv"]
    text = capsys.readouterr().out
    assert f"auroc                        {found['auroc']:.4f} ± " in text
    assert "chance 0.5000" in text and "40 others fixed as a test set" in text
    assert found["margins"]["auroc_shuffled"] > 0
    assert f"{found['auroc_shuffled']:.4f} ± {found['margins']['auroc_shuffled']:.4f}" in text
    assert "auroc, by fold: " + " ".join(f"{v:.4f}" for v in found["folds"]["auroc"]) in text


def test_more_classes_are_scored_by_accuracy_and_seeds_have_folds_of_their_own(data, few):
    found = told(*BASIC, "--label=three", "--seeds=42,7")["probe:e.parquet three"]
    order = np.argsort(data["ids"])
    x, y, none = data["x"][order], data["three"][order], np.zeros(N, bool)
    expected = [*by_hand(x, y, none, 42, 15)[0], *by_hand(x, y, none, 7, 15)[0]]
    assert found["folds"]["accuracy"] == expected and len(set(expected)) > 2
    assert found["margins"]["accuracy"] == probe.margin(expected)
    share = np.bincount(data["three"]).max() / N
    assert found["chances"] == {"accuracy": share, "accuracy_shuffled": share}
    assert found["accuracy"] > share + 0.3 and abs(found["accuracy_shuffled"] - share) < 0.12
    assert "accuracy_test" not in found and found["tested"] == 0


def test_folds_are_scikit_learns_and_labels_are_shuffled_by_the_seed():
    from sklearn.model_selection import StratifiedKFold

    labels = np.random.default_rng(0).integers(0, 3, 90)
    test = np.arange(90) < 20
    x = np.zeros((90, 1))
    made = vectors.Joined({"a": x, "b": x + 1}, labels, [0, 1, 2], test, [])
    jobs = probe.fits_of(made, 3)
    theirs = list(StratifiedKFold(5, shuffle=True, random_state=3).split(x[~test], labels[~test]))
    for name in "ab":
        mine = [job for job in jobs if job.name == name]
        assert len(mine) == len(theirs) == 5
        for job, (train, valid) in zip(mine, theirs, strict=True):
            assert (job.train - 20).tolist() == train.tolist()
            assert (job.scored[0] - 20).tolist() == valid.tolist()
            assert job.scored[1].tolist() == list(range(20))
    shuffled = [job for job in jobs if job.name == probe.SHUFFLED]
    assert len(shuffled) == 5 and shuffled[0].vectors is x
    for job in shuffled:
        assert sorted(job.labels[20:]) == sorted(labels[20:])
        assert np.mean(job.labels[20:] == labels[20:]) < 0.6


def test_random_vectors_know_nothing_and_no_more_of_shuffled_labels(data, few):
    draw = np.random.default_rng(1)
    ids = np.arange(2000)
    a, b = draw.normal(size=(2, 2000))
    write_csv("r.csv", id=ids, a=a, b=b)
    write_csv("rl.csv", id=ids, label=ids % 2)
    found = told("--embeddings=r.csv", "--labels=rl.csv")["probe:r.csv label"]
    assert abs(found["auroc"] - 0.5) < 0.05 and abs(found["auroc_shuffled"] - 0.5) < 0.05


# ---- files

def test_the_order_of_rows_and_the_kind_of_file_change_nothing(data, few):
    first = told(*BASIC)["probe:e.parquet label"]
    turn = np.random.default_rng(2).permutation(N)
    columns = {f"emb_{i + 1:04d}": data["x"][turn, i] for i in range(D)}
    table = pa.table({"id": [str(one) for one in data["ids"][turn]], "n": turn, **columns})
    pq.write_table(table, "e.parquet")
    pq.write_table(pa.table({"label": data["two"], "id": data["ids"].astype(float)}), "l.parquet")
    second = told("--embeddings=e.parquet", "--labels=l.parquet")["probe:e.parquet label"]
    assert first == second  # by hash, too
    draw = np.random.default_rng(3)
    write_csv("l.csv", id=data["ids"], label=draw.permutation(data["two"]))
    assert told(*BASIC)["probe:e.parquet label"]["made_of"] != first["made_of"]


def test_vectors_of_several_files_are_appended_by_id(data, few, capsys):
    half = data["x"][:, :2].astype(float), data["x"][:, 2:].astype(float)
    write_csv("a.csv", id=data["ids"], u=half[0][:, 0], v=half[0][:, 1])
    turn = np.arange(N)[::-1][5:]  # the first five rows' ids are missing from neither
    write_csv("b.csv", id=data["ids"][turn], **{f"w{i}": half[1][turn, i] for i in range(3)})
    found = told("--embeddings=a.csv,b.csv", "--labels=l.csv")["probe:a.csv,b.csv label"]
    assert "left out: 5 ids of a.csv are not in all of a.csv,b.csv" in capsys.readouterr().out
    kept = np.sort(turn)
    write_csv("c.csv", id=data["ids"][kept],
              **{f"z{i}": data["x"][kept, i].astype(float) for i in range(D)})
    whole = told("--embeddings=c.csv", "--labels=l.csv")["probe:c.csv label"]
    assert found == whole and found["n"] == N - 5
    eval.Path("b.csv").rename("d,e.csv")  # a comma in a name
    assert "probe:d,e.csv label" in told("--embeddings=d,e.csv", "--labels=l.csv")


def test_what_is_left_out_is_counted(data, few, capsys):
    ids = [*data["ids"][10:], *range(900, 907)]  # 10 vectors without a label, 7 unknown
    labels = [*map(str, data["two"][10:]), *"0101010"]
    labels[0] = labels[1] = None
    write_csv("l.csv", id=ids, label=labels)
    write_csv("t.csv", id=[*data["ids"][20:60], 901, 5000])
    hand = data["ids"][4:]
    write_csv("hand.csv", id=hand[:-3], s=range(len(hand) - 3), flag=["true"] * (len(hand) - 3),
              name=["n"] * (len(hand) - 3))
    found = told(*BASIC, "--test_ids=t.csv", "--against=hand.csv")["probe:e.parquet label"]
    text = capsys.readouterr().out
    assert "left out: 7 labels are of ids that e.parquet lacks" in text
    assert "left out: 12 vectors of e.parquet have no label" in text
    assert "left out: 3 ids are not in hand.csv, for none probed" in text
    assert "left out: 2 ids of t.csv are not known here" in text
    assert "no numbers, and left out of the vectors of hand.csv: name\n" in text
    assert found["n"] + found["tested"] == N - 12 - 3 and found["tested"] == 40


def test_what_pandas_and_pyarrow_read_as_missing_is_no_label_and_in_quotes_it_is(data, capsys):
    from pyarrow import csv
    pandas = pytest.importorskip("pandas")
    words = ["", "NA", "N/A", "n/a", "#N/A", "#NA", "NaN", "nan", "-nan", "null", "NULL", "None",
             "<NA>", "1.#IND", *csv.ConvertOptions().null_values]
    texts = ["none", "na", "Na", "-", "?", " NA", "nil", "0", "é"]
    write_csv("l.csv", id=range(len(words) + len(texts)), label=[*words, *texts])
    theirs = pandas.read_csv("l.csv", dtype=str)["label"].dropna()
    said = []
    found = vectors.read_labels("l.csv", "id", "label", said.append)
    assert found == {str(i): text for i, text in theirs.items()}
    assert list(found.values()) == texts
    assert said == [f"note: left out: {len(words)} labels of l.csv are missing: empty, NA, None, "
                    "null, ... without quotes"]
    eval.Path("l.csv").write_text('id,label\n1,"NA"\n2,"None"\n3,NA\n4,""\n5,"DE"\n6,\n')
    assert vectors.read_labels("l.csv", "id", "label", said.append) == {
        "1": "NA", "2": "None", "5": "DE"}
    pq.write_table(pa.table({"id": [1, 2, 3], "label": ["NA", None, "DE"]}), "l.parquet")
    assert vectors.read_labels("l.parquet", "id", "label", said.append) == {"1": "NA", "3": "DE"}
    assert said[-1] == "note: left out: 1 labels of l.parquet are missing"
    for kind, kept in (("0", 0), ("true", True), ("0.5", 0.5)):  # as numbers they stay numbers
        eval.Path("l.csv").write_text(f"id,label\n1,None\n2,{kind}\n3,NA\n")
        assert vectors.read_labels("l.csv", "id", "label", said.append) == {"2": kept}


def test_a_country_is_not_missing(data, few, capsys):
    countries = [["DE", "FR", '"NA"', "NA"][i % 4] for i in range(N)]
    write_csv("l.csv", id=data["ids"], label=countries)
    found = told(*BASIC)["probe:e.parquet label"]
    assert found["n"] == N * 3 // 4 and "accuracy" in found
    text = capsys.readouterr().out
    assert f"probe:e.parquet label of 3 classes, {N * 3 // 4} ids" in text
    assert f"left out: {N // 4} labels of l.csv are missing" in text
    assert f"{N // 4} vectors of e.parquet have no label" in text


def test_several_labels_of_the_same_vectors_stay_beside_each_other(home, few, tmp_path):
    for label in ("label", "three", "label"):
        assert run(*BASIC, STEP, "--against=hand.csv", f"--label={label}") == 0
    tasks = results.read_scores(tmp_path / "out/r", 5)["tasks"]
    assert [*tasks] == ["probe:e.parquet label", "probe:hand.csv label", "probe:e.parquet three",
                        "probe:hand.csv three"]
    assert "auroc" in tasks["probe:e.parquet label"]
    assert "accuracy" in tasks["probe:e.parquet three"]


def test_which_columns_are_the_vectors_is_said_and_numbered_ones_are_whole(data, few, capsys):
    columns = {"emb_0001": data["x"][:, 1], "emb_0002": data["two"]}
    write_csv("h.csv", id=data["ids"], **columns, n=data["two"])
    found = told("--embeddings=h.csv", "--labels=h.csv", "--label=emb_0002")
    assert found["probe:h.csv emb_0002"]["auroc"] < 0.7  # the label is none of them
    assert "its columns" not in capsys.readouterr().out
    write_csv("h.csv", id=data["ids"], a=data["x"][:, 0], label=data["two"], b=data["x"][:, 1])
    told("--embeddings=h.csv", "--labels=h.csv")
    assert "note: the vectors of h.csv are its columns a, b\n" in capsys.readouterr().out


def test_the_label_is_no_part_of_a_vector_and_an_id_007_is_no_7(data, few):
    write_csv("all.csv", id=[f"{one:04d}" for one in data["ids"]], a=np.zeros(N),
              label=data["two"])
    found = told("--embeddings=all.csv", "--labels=all.csv")["probe:all.csv label"]
    assert found["auroc"] == 0.5  # nothing but zeros
    write_csv("l.csv", id=data["ids"], label=data["two"])
    with pytest.raises(UserError, match="160 of 160 labels in "):
        run("--embeddings=all.csv", "--labels=l.csv")


def test_labels_are_told_apart_as_they_are_and_ids_may_be_long(data, few):
    for one, other in (("a", "a\0"), (b"a", b"a\0")):
        pq.write_table(pa.table({"id": data["ids"], "label": [
            other if two else one for two in data["two"]]}), "l.parquet")
        assert "auroc" in told("--embeddings=e.parquet", "--labels=l.parquet")[
            "probe:e.parquet label"]
    long = [f"{one}" + "0" * 5000 for one in data["ids"]]
    write_csv("h.csv", id=long, a=data["x"][:, 0])
    write_csv("l.csv", id=long, label=data["two"])
    assert "auroc" in told("--embeddings=h.csv", "--labels=l.csv")["probe:h.csv label"]


# ---- what is refused

def change(path: str, **columns):
    """A file to write before the command."""
    return lambda data: write_csv(path, **{name: values(data) if callable(values) else values
                                           for name, values in columns.items()})


def lists(values):
    """Write e.parquet with these lists."""
    return lambda data: pq.write_table(pa.table({
        "id": data["ids"], "embedding": [*values(data)]}), "e.parquet")


def ids(data):
    return data["ids"]


NO_LIGHTGBM = "lightgbm"
REFUSED = [
    (None, ("--embeddings=", "--labels=l.csv"), "--probe needs --embeddings=FILE"),
    (None, ("--embeddings=e.parquet",), "--probe needs --labels=FILE"),
    (None, ("--embeddings=no.csv", "--labels=l.csv"), "no file no.csv; name a .csv or .parquet"),
    (None, ("--embeddings=e.parquet,", "--labels=l.csv"), "is not a .csv or .parquet"),
    (None, ("--embeddings=e.npy", "--labels=l.csv"), "e.npy is not a .csv or .parquet"),
    (None, (*BASIC, "--id=client_id"), "e.parquet has no column `client_id`; its columns are: id"),
    (None, (*BASIC, "--id=prompt"), "prompt x stands in rows 1 and 2; an id has one row"),
    (None, (*BASIC, "--label=bins"), "l.csv has no column `bins`; its columns are: id, label"),
    (None, (*BASIC, "--label=id"), "--id and --label both name the column `id`"),
    (lambda data: eval.Path("e.parquet").write_bytes(b"PAR1 no"), BASIC,
     "e.parquet is damaged or cut short"),
    (lambda data: eval.Path("l.csv").write_text("id,label\n1,0\n2\n"), BASIC, "l.csv is damaged"),
    (lambda data: eval.Path("l.csv").write_text("id,label\n"), BASIC, "l.csv has no rows"),
    (lambda data: eval.Path("l.csv").write_text("id,a,a\n1,2,3\n"), BASIC,
     "l.csv: several columns are called 'a'"),
    (change("l.csv", id=[3, 4, 3], label=[0, 1, 0]), BASIC,
     "l.csv: id 3 stands in rows 1 and 3; an id has one row"),
    (change("l.csv", id=[3, "", 5], label=[0, 1, 0]), BASIC, "l.csv: row 2 has no `id`"),
    (lambda data: pq.write_table(pa.table({"id": [1.5, 2.0], "a": [1, 2]}), "e.parquet"), BASIC,
     "`id` holds double, and ids are texts or whole numbers"),
    (lists(lambda data: [row[:4 + (i != 2)].tolist() for i, row in enumerate(data["x"])]), BASIC,
     "vectors of different lengths: row 1 has 5 numbers, row 3 has 4"),
    (lists(lambda data: [None if i == 2 else row.tolist() for i, row in enumerate(data["x"])]),
     BASIC, "vectors of different lengths: row 1 has 5 numbers, row 3 has 0"),
    (lists(lambda data: ["[1, 2]"] * N), BASIC, "`embedding` holds string, not lists of numbers"),
    (lists(lambda data: [["a", "b"]] * N), BASIC, "e.parquet has no vectors"),
    (lists(lambda data: np.where(np.arange(N)[:, None] == 6, np.nan, data["x"]).tolist()), BASIC,
     "e.parquet: row 7 has a number that is not finite or missing, as have 1 of 160 rows"),
    (change("h.csv", id=ids, a=[None, *range(N - 1)]), (*BASIC, "--against=h.csv"),
     "h.csv: row 1 has a number that is not finite or missing"),
    (change("h.csv", id=ids, a=["x"] * N), (*BASIC, "--against=h.csv"), "h.csv has no vectors"),
    (change("h.csv", id=lambda data: data["ids"] + 500, a=[1] * N), (*BASIC, "--against=h.csv"),
     "h.csv lacks 160 of 160 ids that e.parquet and l.csv have"),
    (None, (*BASIC, "--against=e.parquet"), "--against=e.parquet names vectors twice"),
    (change("l.csv", id=lambda data: data["ids"] + 100, label=lambda data: data["two"]), BASIC,
     "100 of 160 labels in l.csv are of ids that e.parquet lacks"),
    (change("l.csv", id=lambda data: data["ids"] + 500, label=lambda data: data["two"]), BASIC,
     "160 of 160 labels in l.csv are of ids that e.parquet lacks"),
    (change("l.csv", id=ids, label=[None] * N), BASIC, "l.csv: none of its 160 rows has a `label`"),
    (change("l.csv", id=ids, label=["NA"] * N), BASIC, "l.csv: none of its 160 rows has a `label`"),
    (lambda data: eval.Path("l.csv").write_text(",id,label\n0,1,2\n"), BASIC,
     "l.csv: column 1 has no name (the index of pandas"),
    (lambda data: eval.Path("l.csv").write_text("id;label\n7;2\n9;3\n"), BASIC,
     "label = 2 has 1 ids, and 5 folds need one each"),
    (change("l.csv", id=[3, "NA", 5], label=[0, 1, 0]), BASIC, "l.csv: row 2 has no `id`"),
    (lambda data: eval.Path("l.csv").write_bytes("id,lä\n1,2\n".encode("latin1")), BASIC,
     "l.csv is no UTF-8 text: 'utf-8' codec can't decode"),
    (change("h.csv", id=ids, emb_0001=[1] * N, emb_0002=["x"] * N), (*BASIC, "--against=h.csv"),
     "h.csv: `emb_0002` holds string, and a vector numbers"),
    (change("h.csv", id=ids, emb_0001=[1] * N, emb_0002=["None"] + [2] * (N - 1)),
     (*BASIC, "--against=h.csv"), "h.csv: row 1 has a number that is not finite or missing"),
    (None, ("--embeddings=e.parquet,e.parquet", "--labels=l.csv"),
     "--embeddings=e.parquet,e.parquet names a file twice"),
    (None, (*BASIC, "--out=e.parquet"), "--out=e.parquet is no .json file in a folder"),
    (None, (*BASIC, "--out=l.csv"), "--out=l.csv is no .json file in a folder"),
    (change("h.csv", id=[501, 502], a=[1, 2]),
     ("--embeddings=e.parquet,h.csv", "--labels=l.csv"), "no id is in all of e.parquet,h.csv"),
    (change("l.csv", id=ids, label=["a"] * N), BASIC, "all 160 ids have one class, label = a"),
    (change("l.csv", id=ids, label=["a"] * 4 + ["b"] * (N - 4)), BASIC,
     "label = a has 4 ids, and 5 folds need one each"),
    (change("l.csv", id=ids, label=np.arange(N) / 7), BASIC,
     "label = 0.0 has 1 ids, and 5 folds need one each; leave the class out or join it with "
     "another (there are 160)"),
    (change("l.csv", id=lambda data: data["ids"][:90], label=lambda data: data["two"][:90]), BASIC,
     "90 ids with vector and label are too few: of less than 100"),
    (lambda data: write_csv("t.csv", id=data["ids"][data["two"] == 1][3:]),
     (*BASIC, "--test_ids=t.csv"), "label = 1 has 3 ids besides"),
    (lambda data: write_csv("t.csv", id=data["ids"][data["two"] == 1][:5]),
     (*BASIC, "--test_ids=t.csv"), "t.csv: its known ids are of one class, which has no AUROC"),
    (change("t.csv", id=[900, 901]), (*BASIC, "--test_ids=t.csv"),
     "no id of t.csv has a vector and a label"),
    (None, (*BASIC, "--test_ids=none.csv"), "no file none.csv"),
    (None, (*BASIC, "--seeds=42,x"), "--seeds=42,x: say whole numbers from 0"),
    (None, (*BASIC, "--seeds=1,01"), "a seed stands there twice"),
    (None, (*BASIC, "--out=no/o.json"), "--out=no/o.json is no .json file in a folder"),
    (None, (*BASIC, "--tasks=passkey"), "scores vectors without a model; leave out --tasks"),
    (None, (*BASIC, "--base=x"), "leave out --base"),
    (None, (*BASIC, "--ckpt=nowhere"), "nowhere"),
    (NO_LIGHTGBM, BASIC, "--probe needs lightgbm: python -m pip install -c constraints.txt -e "
     "'.[probe]'"),
]


@pytest.mark.parametrize(("before", "words", "message"), REFUSED)
def test_what_cannot_be_probed_is_said_before_anything_slow(data, monkeypatch, before, words,
                                                            message):
    monkeypatch.setattr(probe, "fit", None)
    if before == NO_LIGHTGBM:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec",
                            lambda name: None if name == "lightgbm" else find(name))
    elif before:
        before(data)
    with pytest.raises(UserError) as caught:
        run(*words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_its_options_are_for_it_alone(data):
    for word in ("--embeddings=e.parquet", "--seeds=1", "--out=o.json", "--id=x"):
        with pytest.raises(UserError, match=f"{word.split('=')[0]} is for --probe"):
            eval.main(parse([word], None, eval.Flags, "files"))
    with pytest.raises(UserError, match="one process"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        run(*BASIC)


# ---- where the scores go

@pytest.fixture
def home(data, tmp_path):
    """A run with a checkpoint."""
    folder = write_checkpoint(tmp_path / "out/r/checkpoints/step_5", tiny())
    write_json(tmp_path / "out/r/run.json", {"config": {}})
    (folder / "training").mkdir()
    write_json(folder / "training/state.json", {"format": 1, "step": 5, "rows": 1, "tokens": 9})
    return folder


STEP = "--ckpt=out/r/checkpoints/step_5"


def test_scores_of_a_run_lie_beside_it_and_are_shown(home, few, tmp_path, capsys):
    (tmp_path / "out/r/eval").mkdir()
    write_json(tmp_path / "out/r/eval/step_5.json", {"step": 5, "tasks": {"passkey": {"acc": 1}}})
    assert run(*BASIC, STEP, "--against=hand.csv", "--json") == 0
    said = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    kept = results.read_scores(tmp_path / "out/r", 5)
    assert kept["tasks"].keys() == {"passkey", "probe:e.parquet label", "probe:hand.csv label"}
    assert (said["step"], said["tokens"]) == (kept["step"], kept["tokens"]) == (5, 9)
    found = kept["tasks"]["probe:e.parquet label"]
    assert said["tasks"]["probe:e.parquet label"] == found and len(found["made_of"]["vectors"]) == 2
    folder = RunFolder("r", {}, [], {}, [], [kept])
    text = "\n".join(block.markdown for block in page.PANELS["Scores"]([folder], tmp_path / "p"))
    value = f"{found['auroc']:.4f} ± {found['margins']['auroc']:.4f}"
    folds = results.told_folds(found["folds"]["auroc"])
    line = next(line for line in text.split("\n") if value in line and folds in line)
    assert "probe:e.parquet label auroc" in line and line.rstrip(" |").endswith("0.5")
    assert "probe:e.parquet label auroc minus hand.csv" in text
    assert "probe:e.parquet label auroc_shuffled" in text


def test_vectors_of_another_model_are_no_score_of_this_one(home, few, tmp_path, monkeypatch):
    from plainllama.weights import peft

    def note(model: str) -> None:
        write_json("e.parquet.made.json", {"file": file_entry(tmp_path / "e.parquet"),
                                           "recipe": {"sha256 of the model": model}})

    own = peft.model_sha256(home)[:16]
    note("f" * 16)
    with pytest.raises(UserError, match="was made by another model than out/r"):
        run(*BASIC, STEP)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="was made by another model than out/r"):
        run("--embeddings=~/e.parquet", "--labels=l.csv", STEP)
    assert run(*BASIC) == 0  # of no model
    note(own)
    assert run(*BASIC, STEP) == 0
    shutil.copytree(home, tmp_path / "model")
    with pytest.raises(UserError, match="model lies in no run"):
        run(*BASIC, "--ckpt=model")


@pytest.mark.parametrize("model", ["own", "f" * 16])
def test_a_note_of_other_vectors_says_nothing_of_these(home, few, data, capsys, model):
    from plainllama.weights import peft

    recipe = {"sha256 of the model": peft.model_sha256(home)[:16] if model == "own" else model}
    write_json("e.parquet.made.json", {"file": file_entry(eval.Path("e.parquet")),
                                       "recipe": recipe})
    write_embeddings("e.parquet", data["ids"], data["x"] + 1)
    for stale in (None, {}, {"recipe": recipe}, {"file": 1, "recipe": 2}):
        if stale is not None:
            write_json("e.parquet.made.json", stale)
        assert run(*BASIC, STEP) == 0
        assert ("note: e.parquet.made.json is of another e.parquet than there is now: nothing says "
                "which model made it") in capsys.readouterr().out
    eval.Path("e.parquet.made.json").unlink()
    assert run(*BASIC, STEP) == 0
    assert "made.json" not in capsys.readouterr().out


def test_what_sample_writes_is_probed(home, few, capfd):
    rows = [{"client_id": f"c{i}", "prompt": "ab"[i % 2] * 3, "bins": i % 2}
            for i in range(vectors.LEAST)]
    eval.Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_csv("l.csv", client_id=[row["client_id"] for row in rows],
              bins=[row["bins"] for row in rows])
    words = [STEP, "--prompts=p.jsonl", "--out=s.parquet", "--embed=mean", "--device=cpu"]
    assert sample.main(parse(words, None, sample.Flags, "files")) == 0
    assert run("--embeddings", "s.parquet", "--labels", "l.csv", "--id", "client_id", "--label",
               "bins", STEP) == 0
    assert capfd.readouterr().err == ""
    scores = results.read_scores(eval.Path("out/r"), 5)["tasks"]["probe:s.parquet bins"]
    assert scores["auroc"] > 0.9 and scores["n"] == vectors.LEAST


# ---- boundaries, on both sides

def test_what_is_fitted_and_how_it_is_told(data, monkeypatch, capsys):
    assert probe.PARAMETERS == {
        "n_estimators": 500, "learning_rate": 0.02, "max_depth": 6, "num_leaves": 63,
        "subsample": 0.5, "subsample_freq": 1, "colsample_bytree": 0.75, "reg_alpha": 1,
        "reg_lambda": 1, "deterministic": True, "force_row_wise": True, "n_jobs": 1,
        "verbosity": -1}
    bars = []

    class Bar(probe.Progress):
        """Kept."""

        def __init__(self, *given):
            super().__init__(*given)
            bars.append((given, self))

    def fitted(job: probe.Fit) -> list[float]:
        value = 0.25 if job.name == probe.SHUFFLED else 0.5 + 0.1 * len(job.train) / 128
        return [value + i / 100 for i in range(len(job.scored))]

    monkeypatch.setattr(probe, "Progress", Bar)
    monkeypatch.setattr(probe, "fit", fitted)
    classes = [f"c{i % 22:02}" for i in range(N)]
    write_csv("l.csv", id=data["ids"], label=classes)
    found = told(*BASIC, "--seeds=3,4", "--test_ids=t.csv")["probe:e.parquet label"]
    [(given, bar)] = bars
    assert given == ("probing", 20, "fits") and bar.done == 20
    counts = ", ".join(f"c{i:02} {7 + (i < 6)} times" for i in range(20))
    said = capsys.readouterr().out
    assert f"label: {counts}\n" in said and "of 22 classes, 120 ids" in said
    most = max(np.bincount([i % 22 for i in range(N)][40:]))
    assert found["chances"] == {
        "accuracy": most / 120, "accuracy_shuffled": most / 120,
        "accuracy_test": max(np.bincount([i % 22 for i in range(40)])) / 40}
    assert found["accuracy_shuffled"] == pytest.approx(0.25)
    assert len(found["folds"]["accuracy"]) == 10
    assert found["folds"]["accuracy_test"] == pytest.approx(
        [value + 0.01 for value in found["folds"]["accuracy"]])
    assert "accuracy_test_shuffled" not in found
    assert found["made_of"]["seeds"] == [3, 4] and found["made_of"]["label"] == "label"
    assert probe.margin([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    two = vectors.Joined({}, np.array([0, 1, 1]), ["a", "b"], np.zeros(3, bool), [])
    assert probe.chance(two, ~two.test) == 0.5
    three = two._replace(classes=["a", "b", "c"])
    assert probe.chance(three, ~two.test) == 2 / 3 and probe.chance(three, two.test) == 0


def test_older_checkpoints_count_rows(home, tmp_path):
    state = home / "training/state.json"
    flags = eval.Flags(ckpt="out/r/checkpoints/step_5")
    assert probe.checkpoint_of(flags, print)[1]["tokens"] == 9
    write_json(state, {"format": 1, "step": 5, "rows": 3})
    run_home, known = probe.checkpoint_of(flags, print)
    assert (run_home.resolve(), known["step"], known["tokens"]) == (
        tmp_path / "out/r", 5, 3 * tiny().config.block_size)
    assert (tmp_path / "out/r/eval").is_dir()


def test_lists_of_names_end_after_twelve():
    names = [f"n{i}" for i in range(13)]
    assert vectors.shortened([]) == "none" and vectors.shortened(["a", "b"]) == "a, b"
    assert vectors.shortened(names[:12]) == ", ".join(names[:12])
    assert vectors.shortened(names) == ", ".join(names[:12]) + ", ... (13)"
    said: list[str] = []
    for n in (0, 1, 1234):
        vectors.counted(said.append, n, "rows")
    assert said == ["note: left out: 1 rows", "note: left out: 1,234 rows"]


def joined_of(counts: dict, tests: dict | None = None) -> vectors.Joined:
    """Ids with so many labels of each class, and so many test ids."""
    tests = tests or {}
    labels = [i for i, name in enumerate(counts) for _ in range(counts[name])]
    labels += [[*counts].index(name) for name in tests for _ in range(tests[name])]
    test = np.arange(len(labels)) >= sum(counts.values())
    return vectors.Joined({}, np.array(labels), [*counts], test, ["x"] * len(labels))


@pytest.mark.parametrize(("counts", "tests", "says"), [
    ({"a": 5, "b": 95}, {}, ""), ({"a": 4, "b": 96}, {}, "label = a has 4 ids, and 5 folds"),
    ({"a": 50, "b": 49}, {}, "99 ids with vector and label are too few: of less than 100"),
    ({"a": 99, "b": 5}, {"a": 3}, "t.csv: its known ids are of one class, which has no AUROC"),
    ({"a": 99, "b": 5}, {"a": 3, "b": 1}, ""), ({"a": 90, "b": 5, "c": 5}, {"a": 3}, ""),
    ({"a": 96, "b": 4}, {"b": 3}, "label = b has 4 ids besides 3 test ids, and 5 folds need one"),
    ({"a": 50, "b": 49}, {"b": 3}, "99 ids with vector and label besides 3 test ids are too few"),
    ({"a": 100}, {}, "all 100 ids have one class, label = a: there is nothing to tell apart")])
def test_classes_that_can_be_told_apart(counts, tests, says):
    flags = eval.Flags(test_ids="t.csv" if tests else "")
    if not says:
        return vectors.check_classes(joined_of(counts, tests), flags)
    with pytest.raises(UserError) as error:
        vectors.check_classes(joined_of(counts, tests), flags)
    assert str(error.value).startswith(says)


def test_which_seeds_and_places_are_taken(data, monkeypatch):
    monkeypatch.setattr(vectors, "joined", lambda flags, say: None)
    monkeypatch.setattr(vectors, "check_classes", lambda data, flags: None)

    def taken(**changes):
        given = {"embeddings": "e", "labels": "l"} | changes
        return vectors.ask(eval.Flags(**given), print)[1]

    assert taken(seeds=" 1, 02 ,3") == [1, 2, 3] and taken() == [42]
    assert taken(seeds=str(2**31 - 1)) == [2**31 - 1]
    assert taken(out="o.json") == [42]
    (eval.Path("d.json")).mkdir()
    for changes, says in (({"seeds": str(2**31)}, "say whole numbers from 0, with commas between"),
                          ({"seeds": "1,,2"}, "say whole numbers"), ({"seeds": "-1"}, "say whole"),
                          ({"seeds": "1,2,1"}, "a seed stands there twice"),
                          ({"out": "d.json"}, "--out=d.json is no .json file in a folder"),
                          ({"out": "o.txt"}, "--out=o.txt is no .json")):
        with pytest.raises(UserError, match=says):
            taken(**changes)
    for size, good in (("1", True), ("2", False)):
        monkeypatch.setenv("WORLD_SIZE", size)
        if good:
            taken()
        else:
            with pytest.raises(UserError, match="--probe is for one process; start it without"):
                taken()


def test_half_of_the_labels_must_be_known(data, capsys):
    def found(known: int, other: int) -> vectors.Joined:
        ids = [*data["ids"][:known], *range(9000, 9000 + other)]
        write_csv("l.csv", id=ids, label=[i % 2 for i in range(len(ids))])
        return vectors.joined(eval.Flags(embeddings="e.parquet", labels="l.csv"), print)

    assert len(found(11, 10).ids) == 11
    assert capsys.readouterr().out == (
        "note: left out: 10 labels are of ids that e.parquet lacks\n"
        "note: left out: 149 vectors of e.parquet have no label\n")
    with pytest.raises(UserError, match=r"^10 of 20 labels in l.csv are of ids that e\."):
        found(10, 10)
    write_csv("l.csv", id=data["ids"][:20], label=[i % 2 for i in range(20)])
    for count, good in ((11, True), (10, False)):
        write_csv("hand.csv", id=data["ids"][:count], s=range(count))
        flags = eval.Flags(embeddings="e.parquet", labels="l.csv", against="hand.csv")
        if good:
            assert [*vectors.joined(flags, print).vectors] == ["e.parquet", "hand.csv"]
        else:
            with pytest.raises(UserError, match=r"^hand.csv lacks 10 of 20 ids that e.parquet and"):
                vectors.joined(flags, print)


@pytest.mark.parametrize(("ids", "order"), [
    (["10", "9", "-1", "007"], ["-1", "007", "9", "10"]), (["10", "9", "a"], ["10", "9", "a"]),
    (["1" * 600, "9"], ["9", "1" * 600]), (["1" * 601, "9"], ["1" * 601, "9"])])
def test_ids_are_sorted_as_numbers_where_all_are(data, ids, order):
    write_csv("h.csv", id=ids, a=range(len(ids)), b=[0.5] * len(ids))
    write_csv("l.csv", id=ids, label=[f"c{i}" for i in range(len(ids))])
    write_csv("t.csv", id=ids[:1])
    found = vectors.joined(eval.Flags(embeddings="h.csv", labels="l.csv", test_ids="t.csv"), print)
    assert found.ids == order and found.classes == [f"c{i}" for i in range(len(ids))]
    places = [ids.index(one) for one in order]
    assert found.labels.tolist() == places and found.vectors["h.csv"][:, 0].tolist() == places
    assert found.test.tolist() == [one == ids[0] for one in order]


def test_kinds_of_columns_and_what_they_become(data):
    def read(table: dict, label: str = "label") -> vectors.Vectors:
        pq.write_table(pa.table(table), "v.parquet")
        return vectors.read_vectors("v.parquet", "id", label, lambda line: said.append(line))

    said: list[str] = []
    ids = ["a", "b"]
    found = read({"id": ids, "n": [1, 2], "flag": [True, False], "x": [0.5, 1.5], "text": ids,
                  "label": [7, 8]})
    assert found.values.tolist() == [[1, 1, 0.5], [2, 0, 1.5]] and found.values.dtype == np.float64
    assert said == ["note: no numbers, and left out of the vectors of v.parquet: text",
                    "note: the vectors of v.parquet are its columns n, flag, x"]
    assert found.of(["b", "a", "b"])[:, 0].tolist() == [2, 1, 2]
    small = read({"id": ids, "x": np.array([1, 2], "f4"), "y": np.array([1, 2], "f4")})
    assert small.values.dtype == np.float32
    said.clear()
    lists = read({"id": ids, "embedding": [[1, 2], [3, 4]], "n": [1, 2]})
    assert lists.values.tolist() == [[1, 2], [3, 4]] and said == []
    numbered = read({"id": ids, "emb_1": [1, 2], "emb_x": [5, 6], "n": [3, 4]})
    assert numbered.values.tolist() == [[1], [2]] and said == []
    for table, says in (
            ({"id": ids, "embedding": [[1.0], [2.0, 3.0]]}, "row 1 has 1 numbers, row 2 has 2"),
            ({"id": ids, "n": [1.0, None]}, "row 2 has a number that is not finite or missing, as "
                                            "have 1 of 2 rows"),
            ({"id": ids}, "v.parquet has no vectors: lists of numbers in `embedding`, or columns "
                          "of numbers; its columns are: id"),
            ({"id": ids, "embedding": [[], []]}, "v.parquet has no vectors"),
            ({"id": ["a", None], "n": [1, 2]}, "v.parquet: row 2 has no `id`"),
            ({"id": ["a", " "], "n": [1, 2]}, "v.parquet: row 2 has no `id`"),
            ({"id": ["a", "a"], "n": [1, 2]}, "v.parquet: id a stands in rows 1 and 2; an id has"),
            ({"id": [[1], [2]], "n": [1, 2]}, "v.parquet: `id` holds list<")):
        with pytest.raises(UserError) as error:
            read(table)
        assert says in str(error.value), str(error.value)
    assert read({"id": [1.0, 20.0], "n": [1, 2]}).rows == {"1": 0, "20": 1}
    pq.write_table(pa.table({"id": ids, "label": [{"x": 1}, {"x": 2}]}), "l.parquet")
    with pytest.raises(UserError, match="and a label is one value"):
        vectors.read_labels("l.parquet", "id", "label", print)
    pq.write_table(pa.table({"id": [*"abcd"], "label": [1.5, None, float("nan"), 0.0]}),
                   "l.parquet")
    said.clear()
    assert vectors.read_labels("l.parquet", "id", "label", said.append) == {"a": 1.5, "d": 0.0}
    assert said == ["note: left out: 2 labels of l.parquet are missing"]


def test_vectors_of_several_files_that_are_not_all_there(data):
    said: list[str] = []
    one = vectors.Vectors("a", {"x": 0, "y": 1, "z": 2}, np.array([[1], [2], [3]]))
    other = vectors.Vectors("b", {"z": 0, "x": 1, "w": 2}, np.array([[4], [5], [6]]))
    found = vectors.appended("a,b", [one, other], said.append)
    assert found.rows == {"x": 0, "z": 1} and found.values.tolist() == [[1, 5], [3, 4]]
    assert said == ["note: left out: 1 ids of a are not in all of a,b",
                    "note: left out: 1 ids of b are not in all of a,b"]
    with pytest.raises(UserError, match=r"^no id is in all of a,b$"):
        vectors.appended("a,b", [one, vectors.Vectors("b", {"q": 0}, np.array([[1]]))], print)
    assert vectors.parts_of("") == [] and vectors.parts_of("a.csv, b.csv") == ["a.csv", "b.csv"]
