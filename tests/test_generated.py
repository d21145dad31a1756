"""Generated answers scored: metrics against sacrebleu and rouge-score themselves, rows, what is
generated and kept, the command line, an evaluation along a run, the page."""

import gzip
import itertools
import json
import lzma
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import metrics as metrics_of
from conftest import run_script
from test_chat import made
from test_sample import tiny, write_checkpoint

import eval
from plainllama import results
from plainllama.command import parse
from plainllama.evaluation import generated, metrics
from plainllama.evaluation.likelihood import Scorer
from plainllama.files import read_json, write_json
from plainllama.generation import generate
from plainllama.parallel import World
from plainllama.report import page
from plainllama.report.runs import RunFolder
from plainllama.settings import Sampling, Settings, UserError
from plainllama.tokens import chat
from plainllama.tokens.tokenizer import make_tokenizer

SCRIPTS = ["The sea is wide and blue.", "Море широкое и синее сегодня.", "大海今天又宽又蓝。",
           "समुद्र आज बहुत चौड़ा और नीला है।", "ทะเล วันนี้ กว้าง และ สีฟ้า", "البحر اليوم واسع وأزرق.",
           "הים רחב וכחול היום.", "바다는 오늘 넓고 푸르다.", "海は今日とても広くて青い。",
           "Η θάλασσα είναι πλατιά.", "Cafe\u0301 a\u0300 la mode\u0302 et fe\u0302te.",
           "தமிழ் கடல் இன்று மிகவும் நீலம்."]
CALL = {"name": "add", "arguments": {"a": 1, "b": [True, {"c": "ü"}]}}


def says(*texts: str) -> list[dict]:
    """Messages that say these texts."""
    return [{"role": "assistant", "content": text} for text in texts]


def scored(names, answers, references, tokenizer="13a") -> dict:
    """The scores of texts; `references`: of each a list of texts."""
    found, _ = metrics.scores(names, says(*answers), [], [says(*row) for row in references],
                              tokenizer)
    return found


# ---- metrics

PAIRS = [  # answers, references of each, sacrebleu's tokenizer
    (["The cat sat on the mat today.", "A dog."], [["The cat sat on a mat today."],
                                                   ["The dog barks."]], "13a"),
    (["Кошка сидела на ковре весь день.", "Собака громко лает там."],
     [["Кошка сидела на ковре весь вечер."], ["Собака тихо лает там."]], "13a"),
    (["猫今天坐在垫子上面。", "狗在外面叫。"], [["猫昨天坐在垫子上面。"],
                                     ["狗在外面大声叫。"]], "zh"),
    (["one two three four five", "a b c d"],  # not as many references of each
     [["one two three four six", "one two three four five six"], ["a b c e"]], "13a"),
]


@pytest.mark.parametrize(("answers", "references", "tokenizer"), PAIRS)
def test_bleu_and_chrf_are_sacrebleus(answers, references, tokenizer):
    from sacrebleu.metrics import BLEU, CHRF

    found = scored(["bleu", "chrf"], answers, references, tokenizer)
    most = max(map(len, references))
    streams = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    for name, metric in (("bleu_gen", BLEU(tokenize=tokenizer)), ("chrf_gen", CHRF())):
        assert found[name] == pytest.approx(metric.corpus_score(answers, streams).score, abs=1e-9)
        assert found["signatures"][name] == str(metric.get_signature())
    assert f"tok:{tokenizer}" in found["signatures"]["bleu_gen"]


def test_rouge_is_rouge_scores_where_its_own_tokenizer_does():
    from rouge_score.rouge_scorer import RougeScorer

    answers = ["the cat sat on the mat\nall day", "nothing at all", ""]
    references = [["the cat lay on a mat\nall day long", "a cat sat"], ["something else"], ["yes"]]
    found = scored(["rouge"], answers, references)
    for name in ("rouge1", "rouge2", "rougeLsum"):
        theirs = [RougeScorer([name]).score_multi(row, answer)[name].fmeasure
                  for answer, row in zip(answers, references, strict=True)]
        assert found[f"{name}_gen"] == pytest.approx(sum(theirs) / 3)


@pytest.mark.parametrize("text", SCRIPTS)
def test_a_copy_is_perfect_in_every_script_and_an_empty_answer_is_nothing(text):
    by = metrics.tokenizer_for([says(text)])
    best = {"bleu_gen": 100, "chrf_gen": 100, "rouge1_gen": 1, "rouge2_gen": 1, "rougeLsum_gen": 1,
            "exact_gen": 1}
    names = ["bleu", "chrf", "rouge", "exact"]
    found = scored(names, [text], [[text]], by)
    assert {name: found[name] for name in best} == pytest.approx(best)
    found = scored(names, [""], [[text]], by)
    assert {name: found[name] for name in best} == dict.fromkeys(best, 0)
    half = scored(names, [text, ""], [[text], [text]], by)  # an empty one is counted
    assert half["rouge1_gen"] == 0.5 and 0 < half["bleu_gen"] < 100


def test_words_are_whole_in_scripts_with_marks_and_single_in_chinese():
    words = metrics.Words().tokenize
    assert words("हिन्दी में, ठीक!") == ["हिन्दी", "में", "ठीक"]
    assert words("ทะเล กว้าง") == ["ทะเล", "กว้าง"]
    assert words("Cafe\u0301 12x") == words("CAF\u00c9 12x") == ["caf\u00e9", "12x"]
    assert words("GPT4在北京") == ["gpt4", "在", "北", "京"]


@pytest.mark.parametrize(("text", "tokenizer"), [
    ("The sea", "13a"), ("Море", "13a"), ("大海很宽 ok", "zh"), ("海は広い", "char"),
    ("ทะเลกว้าง", "char"), ("바다는 넓다", "13a"), ("123", "13a"),
    ("A long English text with one sign 海", "13a")])
def test_the_tokenizer_of_bleu_goes_by_the_script(text, tokenizer):
    assert metrics.tokenizer_for([says(text)]) == tokenizer


def test_intervals_are_of_resampled_rows():
    hits = ["x"] * 30 + ["y"] * 70
    low, high = scored(["exact"], hits, [["x"]] * 100)["intervals"]["exact_gen"]
    spread = 1.96 * math.sqrt(0.3 * 0.7 / 100)
    assert low == pytest.approx(0.3 - spread, abs=0.02)
    assert high == pytest.approx(0.3 + spread, abs=0.02)
    found = scored(["bleu"], *PAIRS[0][:2])
    low, high = found["intervals"]["bleu_gen"]
    assert low <= found["bleu_gen"] <= high and low < high


@pytest.mark.parametrize(("answer", "right", "names"), [
    (CALL, True, True),
    ({"name": "add", "arguments": {"b": [True, {"c": "ü"}], "a": 1.0}}, True, True),
    ({"name": "add", "arguments": {"a": 1, "b": [1, {"c": "ü"}]}}, False, True),  # 1 is not true
    ({"name": "add", "arguments": {"a": "1", "b": [True, {"c": "ü"}]}}, False, True),
    ({"name": "add", "arguments": {"a": 1}}, False, True),
    ({"name": "sub", "arguments": CALL["arguments"]}, False, False)])
def test_calls_match_by_json_value(answer, right, names):
    given = [{"content": "", "tool_calls": [answer]}, *says("no call")]
    found, _ = metrics.scores(["calls"], given, [], [
        [{"content": "", "tool_calls": [CALL]}], [{"content": "", "tool_calls": [CALL]}]], "13a")
    assert found["calls_gen"] == right / 2 and found["call_names_gen"] == names / 2


def test_metrics_are_chosen_by_the_rows():
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    long, short = says("one two three four"), says("yes")
    assert metrics.chosen("", [long], "13a") == ["bleu", "chrf", "rouge", "exact"]
    assert metrics.chosen("", [short], "13a") == ["chrf", "rouge", "exact"]
    assert metrics.chosen("", [[call]], "13a") == ["exact", "calls"]
    assert metrics.chosen("", [[call], long], "13a") == ["bleu", "chrf", "rouge", "exact", "calls"]
    assert metrics.chosen("exact, bleu_tf", [long], "13a") == ["exact", "bleu_tf"]
    for asked, rows, said in (
            ("blue", [long], "--metrics takes bleu, .*, not blue; did you mean bleu"),
            ("calls", [long], "--metrics=calls: no reference calls a function"),
            ("chrf", [[call]], "--metrics=chrf: no reference has text"),
            ("bleu", [short], "runs of up to 4 words, and no reference has as many")):
        with pytest.raises(UserError, match=said):
            metrics.chosen(asked, rows, "13a")


def test_a_library_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: name == "numpy" or None)
    with pytest.raises(UserError, match=r"rouge needs rouge-score: .*'\.\[generate\]'"):
        metrics.chosen("rouge", [says("a")], "13a")
    assert metrics.tokenizer_for([says("海")]) == "13a"
    assert metrics.chosen("exact", [says("a")], "13a") == ["exact"]


# ---- rows

WORDS = make_tokenizer("bytes", None)
TALKS = made("bytes")


def how(file="", **changes) -> SimpleNamespace:
    """What decides answers and scores."""
    return SimpleNamespace(**{
        **vars(Sampling(temperature=0)), "generate": str(file), "fields": None, "chat": "auto",
        "limit": 0, "metrics": "exact", "bleu_tokenizer": "auto", "stop": [], "seed": 0,
        "max_new_tokens": 8, "base": "", "dtype": torch.float32, **changes})


def write(path, *rows):
    """A .jsonl of rows; text stays as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_rows_of_all_kinds(tmp_path):
    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    openai = {"tool_calls": [{"type": "function", "function": {
        "name": "add", "arguments": json.dumps(CALL["arguments"])}}]}
    file = write(tmp_path / "f.jsonl", {"prompt": "P", "reference": "R"},
                 {"messages": talk, "reference": ["R", "S"]},
                 {"messages": talk, "tools": [{"name": "add"}], "reference": openai},
                 {"messages": [*talk, {"role": "assistant", "content": "last"}]},
                 {"system": "S", "messages": talk[1:], "reference": "R"})
    rows = generated.read(how(file), TALKS, 256).rows
    ours = chat.Chat(TALKS)
    assert rows[0].ids == ours.prompt([{"role": "user", "content": "P"}])
    assert rows[1].ids == ours.prompt(talk) and rows[1].shown == "system: S\nuser: Q"
    assert rows[2].ids == ours.prompt(talk, [{"name": "add"}])
    assert [row.references for row in rows] == [
        says("R"), says("R", "S"), [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
        says("last"), says("R")]
    assert rows[4].ids == rows[1].ids
    plain = write(tmp_path / "g.jsonl", {"prompt": "P", "reference": "R"})
    as_it_is = [TALKS.bos_id, *TALKS.encode("P")]
    assert generated.read(how(plain, chat="false"), TALKS, 256).rows[0].ids == as_it_is
    assert generated.read(how(plain), WORDS, 256).rows[0].ids == [WORDS.bos_id, *WORDS.encode("P")]


def test_kinds_of_files_and_names_of_fields(tmp_path):
    rows = [{"en": f"a{i}", "de": f"b{i}", "prompt": "not this"} for i in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    files = {"f.jsonl": text, "f.jsonl.gz": gzip.compress(text), "f.jsonl.xz": lzma.compress(text),
             "f.json": json.dumps(rows).encode()}
    fields = {"prompt": "en", "reference": "de"}
    digests = set()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        asked = generated.read(how(tmp_path / name, fields=fields, limit=2), WORDS, 64)
        assert [row.text for row in asked.rows] == ["a0", "a1"], name
        assert [row.references for row in asked.rows] == [says("b0"), says("b1")]
        digests.add(asked.digest)
    assert len(digests) == 1


BAD = [  # rows, what is said
    (['{"prompt": "a", "reference": "b"}', "{broken"], r"f.jsonl:2: broken line"),
    (["[1, 2]"], "f.jsonl:1: broken line"),
    ([{"prompt": "a"}], "f.jsonl:1: its `reference` is missing.*None"),
    ([{"prompt": "a", "reference": 7}], "f.jsonl:1: its `reference` is no text.*7"),
    ([{"prompt": "a", "reference": []}], "f.jsonl:1: its `reference` is missing"),
    ([{"prompt": "a", "reference": ["b", 3]}], "f.jsonl:1: its `reference` is no text.*3"),
    ([{"prompt": "a", "reference": " "}], "f.jsonl:1: its reference is no answer, or an empty"),
    ([{"prompt": "a", "reference": {"role": "user", "content": "b"}}], "is no answer, or an empty"),
    ([{"prompt": "a", "reference": {"tool_calls": [{"arguments": {}}]}}], "a call without a name"),
    ([{"reference": "b", "q": "a"}],
     "f.jsonl:1: a row has neither prompt nor messages .--fields names others.: reference, q"),
    ([{"prompt": "a", "messages": [], "reference": "b"}], "f.jsonl:1: a row has both prompt and m"),
    ([{"prompt": 3, "reference": "b"}], "f.jsonl:1: messages are not a list"),
    ([{"messages": [{"role": "king", "content": "a"}], "reference": "b"}], "unknown role: 'king'"),
    ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
       "reference": "c"}], "the last message is an answer"),
    ([{"messages": [{"role": "user", "content": "a"}], "reference": "b"}],
     "this model knows no dialogs: its tokenizer lacks"),
    ([{"prompt": "a" * 99, "reference": "b"}], "no prompt has room in a context of 32 tokens"),
    (['{"prompt": "a", "reference": "b", "x": NaN}'], "a value that JSON does not have"),
    ([""], "f.jsonl is empty"),
]


@pytest.mark.parametrize(("rows", "said"), BAD)
def test_rows_that_are_wrong_are_named(tmp_path, monkeypatch, rows, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "f.jsonl", *rows)
    with pytest.raises(UserError, match=said):
        generated.read(how("f.jsonl"), WORDS, 32)


@pytest.mark.parametrize(("changes", "said"), [
    ({"generate": "gone.jsonl"}, "no file gone.jsonl; name rows of `prompt`"),
    ({"generate": "f.csv"}, "f.csv: unknown kind of file"),
    ({"generate": "f.txt"}, "f.txt: dialogs are rows of .jsonl"),
    ({"fields": "en,de"}, r"--fields=en,de: say \{'prompt': 'YOURS'"),
    ({"fields": {"promt": "en"}}, "ours are prompt, messages, tools, reference"),
    ({"fields": {"prompt": "en"}}, "f.jsonl:1 .*a field that is named|no en"),
    ({"chat": "true"}, "this model knows no dialogs"),
    ({"metrics": "bleau"}, "not bleau; did you mean bleu"),
    ({"metrics": "calls"}, "no reference calls a function")])
def test_what_does_not_fit_is_said(tmp_path, monkeypatch, changes, said):
    monkeypatch.chdir(tmp_path)
    for name in ("f.jsonl", "f.csv", "f.txt"):
        write(tmp_path / name, {"prompt": "a", "reference": "b"})
    with pytest.raises(UserError, match=said):
        generated.read(how(**{"generate": "f.jsonl"} | changes), WORDS, 32)


# ---- what is generated

@pytest.fixture
def model():
    return tiny()


def row(text: str, *references: str, ids: list | None = None) -> generated.Row:
    """A row of a prompt."""
    ids = [WORDS.bos_id, *WORDS.encode(text)] if ids is None else ids
    return generated.Row(text, text, ids, says(*(references or ("x",))))


def test_a_common_beginning_is_computed_once_and_changes_nothing(model, monkeypatch):
    ids = [256, *range(20)]
    rows = [row("", ids=ids + more) for more in ([30], [31, 32, 33], [34, 35], [36], [37] * 5)]
    rows.append(row("", ids=[256, 1]))
    computed, begun = [], generate.begun
    monkeypatch.setattr(generate, "begun", lambda model, ids: computed.append(ids) or begun(
        model, ids))
    for size in (2, 4, 6):
        computed.clear()
        scorer = Scorer(model, WORDS, size * model.config.block_size, World())
        found = generated.generated(rows, how(), scorer)
        assert computed == ([] if size == 6 else [ids])
        for each, new in zip(rows, found, strict=True):
            [alone] = generate.complete(model, WORDS, [each.ids], 8, how(), [0], [])
            assert new == {"text": alone.text, "stop": alone.ended}


def test_batches_hold_every_row_once_and_alike_ones_together():
    long = {i: [7] * 20 + [i] * (i % 3 + 1) for i in range(5)}
    rows = long | {i: [i] * 3 for i in range(5, 12)}
    batches = generated.batches_of(rows, 4)
    assert sorted(i for batch in batches for i in batch) == list(range(12))
    assert any(set(batch) <= long.keys() for batch in batches)
    alone = generated.batches_of({i: [i] * (i + 1) for i in range(4)}, 2)
    assert alone == [[3, 2], [1, 0]]  # by length, where nothing is shared
    assert generated.batches_of({}, 4) == []


def scripted(monkeypatch, answers: dict[str, str]) -> list:
    """Answer prompts by a script; the prompts that were answered, in batches."""
    seen = []

    def complete(model, tokenizer, prompts, most, sampling, seeds, stops, begin=None):
        texts = [tokenizer.decode(ids) for ids in prompts]
        seen.append(texts)
        return [generate.Completion("eos", answers.get(text, ""), []) for text in texts]

    monkeypatch.setattr(generate, "complete", complete)
    return seen


def test_prompts_without_room_are_counted_and_score_nothing(model, monkeypatch, capsys):
    scripted(monkeypatch, {"a": " x ", "b": "y"})
    rows = [row("a"), row("b"), row("c"), row("d" * 99)]
    asked = generated.Asked(rows, ["exact"], "13a", "")
    scorer = Scorer(model, WORDS, 4096, World())
    found = generated.score("t", asked, how(), scorer)["t"]
    assert (found["exact_gen"], found["n"], found["too_long"], found["empty"]) == (0.25, 4, 1, 2)
    assert scorer.samples["t"][3]["stop"] == "too long"
    table = results.score_table("t", found)
    assert "1 too long for the context and not answered, 2 answers empty" in table
    assert "95 % 0.0000 to 0.7500" in table
    assert {each["row"] for each in found["examples"]} == {1, 2, 3, 4}


def test_answers_of_dialogs_are_read_as_messages(model, monkeypatch, tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    talk = [{"role": "user", "content": "1+1?"}]
    file = write(tmp_path / "f.jsonl", *({"messages": talk, "reference": call} for _ in range(3)),
                 {"messages": talk, "reference": "two"})
    texts = [chat.written(call), '<tool_call>\n{"name": "add"', chat.written(CALL | call),
             "<think>\nhm\n</think>\n\ntwo"]
    monkeypatch.setattr(generate, "complete", lambda model, tokenizer, prompts, *_, **more: [
        generate.Completion("eos", text, []) for text in texts[:len(prompts)]])
    asked = generated.read(how(file, metrics="calls,exact"), TALKS, 4096)
    scorer = Scorer(model, TALKS, 99 * model.config.block_size, World())
    scorer.block_size = 4096
    scorer.batch_tokens = 99 * 4096
    found = generated.score("t", asked, how(), scorer)["t"]
    assert found["calls_gen"] == pytest.approx(2 / 3)  # one is half a call
    assert found["exact_gen"] == 3 / 4  # what is thought is no part of an answer
    assert found["examples"][0]["answer"].startswith("<tool_call>")


def test_the_teacher_forced_twin_has_another_name(model, monkeypatch):
    """The likeliest tokens behind the true beginning of a reference, by a whole forward pass."""
    monkeypatch.setattr(generate, "complete", None)  # nothing is generated for it
    rows = [row("ab", "cd ef gh ij kl"), row("", "one two three four"), row("q" * 60, "x y z w")]
    scorer = Scorer(model, WORDS, 4096, World())
    texts = [each["content"] for each in generated.forced(rows, scorer)]
    for each, text in zip(rows[:2], texts, strict=False):
        behind = WORDS.encode(f" {each.references[0]['content']}")
        with torch.no_grad():
            logits = model(torch.tensor([each.ids + behind]))[0, len(each.ids) - 1:-1, :258]
        assert text == WORDS.decode_behind(logits.argmax(-1).tolist())
    assert texts[2] == ""  # no room
    asked = generated.Asked(rows, ["bleu_tf"], "13a", "")
    found = generated.score("t", asked, how(), scorer)["t"]
    assert "bleu_tf" in found and not any(name.endswith("_gen") for name in found)
    assert "bleu_tf" in found["intervals"] and "examples" not in found


def test_ranks_share_the_rows(model, monkeypatch):
    answers = {"a": "1", "b": "2", "c": "3"}
    rows, parts = [row(text) for text in answers], []
    for rank in (0, 1):
        scripted(monkeypatch, answers)
        world = World()
        world.rank, world.size = rank, 2
        monkeypatch.setattr(world, "agree", lambda value: value)
        monkeypatch.setattr(world, "gather", lambda part: parts.append(part) or parts)
        found = generated.generated(rows, how(), Scorer(model, WORDS, 1, world))
    assert [new["text"] for new in found] == ["1", "2", "3"]
    assert [sorted(part) for part, _ in parts] == [[0, 2], [1]]
    parts.append((None, "what the model computes is not finite"))
    with pytest.raises(UserError, match="not finite"):  # of another rank
        generated.generated(rows, how(), Scorer(model, WORDS, 1, world))


# ---- to the letter

def test_intervals_are_these_draws():
    counts = np.array([[0.0, 1], [1, 1], [1, 1], [0, 1], [1, 1]])
    measure = metrics.Measure("m", counts, lambda total: float(total[0] / total[1]))
    draw = np.random.default_rng(12345)
    drawn = [counts[draw.integers(5, size=5)].sum(0) for _ in range(1000)]
    low, high = np.percentile([hits / n for hits, n in drawn], [2.5, 97.5])
    assert measure.interval() == [low, high]
    values = [0.123, 0.456, 0.789, 0.2, 0.9, 0.31]
    measure = metrics.mean_of("m", values)
    draw = np.random.default_rng(12345)
    drawn = [np.take(values, draw.integers(6, size=6)).mean() for _ in range(1000)]
    assert measure.interval() == pytest.approx(np.percentile(drawn, [2.5, 97.5]).tolist())


def test_rows_that_a_metric_is_of():
    call = {"content": "", "tool_calls": [CALL]}
    rows = [says("a"), [call], [*says("a"), call], says("b", "c"), [call | {"content": "d"}]]
    assert metrics.fitting("exact", rows) == [0, 1, 2, 3, 4]
    assert metrics.fitting("calls", rows) == [1, 4] and metrics.fitting("chrf", rows) == [0, 3, 4]
    assert metrics.longest([says("a b", "c d e"), says("f, g")], "13a") == 3
    assert metrics.chosen(" exact , chrf,exact", [says("a b c d")], "13a") == ["exact", "chrf"]
    for words, names in ((3, ["exact"]), (4, ["bleu", "exact"])):
        text = " ".join("abcd"[:words])
        if words == 4:
            assert metrics.chosen("bleu,exact", [says(text)], "13a") == names
        else:
            with pytest.raises(UserError) as error:
                metrics.chosen("bleu,exact", [says(text)], "13a")
            assert str(error.value) == (
                "--metrics=bleu,exact: BLEU counts runs of up to 4 words, and no reference has as "
                "many, so it would be 0; take chrf or exact")
    with pytest.raises(UserError, match="--metrics=bleu_tf: BLEU counts"):
        metrics.chosen("bleu_tf", [says("a b")], "13a")
    for text, by in (("海a", "13a"), ("海海a", "zh"), ("海aa", "13a"), ("海の", "char")):
        assert metrics.tokenizer_for([says(text)]) == by  # of most letters, not of half


def test_only_the_first_rank_says_that_there_is_no_bleu(monkeypatch, capsys):
    for rank, said in (("0", "no bleu: no reference has 4 words\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert metrics.chosen("", [says("yes")], "13a") == ["chrf", "rouge", "exact"]
        assert capsys.readouterr().out == said


@pytest.mark.parametrize(("one", "other", "same"), [
    (1, 1.0, True), (1, True, False), (0, False, False), (True, True, True), ("1", 1, False),
    ([1, 2], [1, 2.0], True), ([1], [1, 2], False), ([1, 2], [2, 1], False), ([], [], True),
    ({"a": 1}, {"a": True}, False), ({"a": [{}]}, {"a": [{}]}, True), ({"a": 1}, {"b": 1}, False),
    ({"a": 1}, {"a": 1, "b": 2}, False), (None, None, True), (None, False, False), ([], {}, False)])
def test_values_are_compared_as_json(one, other, same):
    assert metrics.same(one, other) is same and metrics.same(other, one) is same
    for wrap in (lambda value: [value], lambda value: {"x": value}):
        assert metrics.same(wrap(one), wrap(other)) is same


def test_exact_answers_and_calls_of_several_references():
    call = {"content": "", "tool_calls": [CALL]}
    twice = {"content": "", "tool_calls": [CALL, CALL]}
    references = [[*says("x"), call], [*says("y"), call]]
    for answer, exact, calls, names in (
            (says(" x\n")[0], 0.5, 0.5, 0.5), (call, 0.5, 0.5, 0.5), (twice, 0, 0, 0),
            (call | {"content": "x"}, 0, 0.5, 0.5), (says("z")[0], 0, 0.5, 0.5)):
        found, _ = metrics.scores(["exact"], [answer, says("no")[0]], [], references, "13a")
        assert found["exact_gen"] == exact
        measures = metrics.calls([answer, twice], references, "")
        assert [measure.score(measure.counts.sum(0)) for measure in measures] == [calls, names]


def test_scores_of_rows_alone_are_by_the_first_metric():
    texts = ["one two three four", "five"]
    found, alone = metrics.scores(["bleu_tf", "exact", "chrf"], says(*texts), says(*texts[::-1]),
                                  [says(text) for text in texts], "13a")
    assert alone == {0: 1.0, 1: 1.0} and found["bleu_tf"] < 10
    assert list(found) == ["intervals", "signatures", "bleu_tf", "exact_gen", "chrf_gen"]
    assert found["signatures"].keys() == {"bleu_tf", "chrf_gen"}
    call = {"content": "", "tool_calls": [CALL]}
    _, alone = metrics.scores(["calls"], [says("a")[0], call], [], [says("a"), [call]], "13a")
    assert alone == {1: 1.0}


def test_what_a_file_is_read_with(tmp_path):
    """Its limit, its digest, who talks, and a prompt that has just room."""
    file = write(tmp_path / "f.jsonl", *({"prompt": text, "reference": "r"} for text in "abc"))
    whole, two = (generated.read(how(file, limit=limit), WORDS, 64) for limit in (0, 2))
    assert (len(whole.rows), len(two.rows)) == (3, 2) and whole.digest != two.digest
    assert generated.read(how(file, limit=3), WORDS, 64) == whole
    assert whole.bleu_tokenizer == "13a"
    assert generated.read(how(file, bleu_tokenizer="zh"), WORDS, 64).bleu_tokenizer == "zh"
    assert generated.read(how(file), WORDS, 3).rows  # the begin token and one letter
    with pytest.raises(UserError, match="no prompt has room in a context of 2 tokens"):
        generated.read(how(file), WORDS, 2)
    for told, talks in (("auto", True), ("true", True), ("false", False)):
        assert (generated.read(how(file, chat=told), TALKS, 99).rows[0].text is None) == talks
    every = {name: name for name in generated.FIELDS}  # all four may be named
    with pytest.raises(UserError, match="no messages"):
        generated.read(how(file, fields=every), WORDS, 64)
    asked = {"messages": [{"role": "user", "content": "q"}]}
    lines = write(tmp_path / "g.jsonl", asked | {"reference": ["r", {"content": "s"}]}, {
        "prompt": None, "messages": [*asked["messages"], {"role": "assistant", "content": "t"}]})
    rows = generated.read(how(lines), TALKS, 99).rows
    assert [row.references for row in rows] == [says("r", "s"), says("t")]
    assert rows[0].shown == rows[1].shown == "user: q" and rows[0].ids == rows[1].ids


def test_batches_go_by_their_beginning_and_then_by_length(monkeypatch):
    monkeypatch.setattr(generated, "WORTH", 2)
    alike = {0: [9, 9, 1], 1: [1, 2, 3, 4], 2: [9, 9], 3: [1, 2, 3], 4: [5, 6, 7, 8, 9]}
    assert generated.batches_of(alike, 2) == [[4, 1], [3, 0], [2]]
    assert generated.batches_of(alike, 3) == [[4, 1, 0], [3, 2]]  # none begin alike as a batch does


def test_what_is_shown_of_an_answer():
    sample = {"doc_id": 4, "score": 0.5, "prompt": "p" * 5 + "q" * 1000, "target": says("a", "b"),
              "resps": [says("r" * 1001)]}
    assert generated.example(sample) == {
        "row": 5, "score": 0.5, "prompt": "q" * 1000, "answer": "r" * 1000,
        "reference": "a\n— or —\nb"}
    assert len(generated.example(sample | {"target": says("c" * 1001)})["reference"]) == 1000


def test_the_worst_and_the_best_answers_are_shown(model, monkeypatch):
    def shown(count: int) -> list[int]:
        texts = [chr(97 + i) for i in range(count)]
        scripted(monkeypatch, {text: "word " * (i + 1) for i, text in enumerate(texts)})
        rows = [row(text, "word " * 12) for text in texts]
        asked = generated.Asked(rows, ["chrf"], "13a", "")
        found = generated.score("t", asked, how(), Scorer(model, WORDS, 4096, World()))["t"]
        assert found["n"] == count and found["unfinished"] == 0 and found["empty"] == 0
        return [each["row"] for each in found["examples"]]

    assert shown(10) == [1, 2, 3, 4, 7, 8, 9, 10]
    assert shown(8) == list(range(1, 9)) and shown(5) == [1, 2, 3, 4, 5]


def test_how_a_batch_begins_again(model, monkeypatch):
    """What prompts begin with is computed where a batch has several of at least WORTH tokens."""
    monkeypatch.setattr(generated, "WORTH", 3)
    begun, seen = [], []
    monkeypatch.setattr(generate, "begun", lambda model, ids: begun.append(ids) or ids)

    def complete(model, tokenizer, prompts, most, sampling, seeds, stops, begin=None):
        seen.append((begin, seeds))
        return [generate.Completion("eos", "x", [])] * len(prompts)

    monkeypatch.setattr(generate, "complete", complete)
    prompts = {0: [1, 2, 3, 4], 1: [1, 2, 3, 5], 2: [1, 2, 3, 6], 3: [1, 2, 9, 9], 4: [1, 2, 8, 8],
               5: [7, 7, 7], 6: [7, 7, 7, 8]}
    scorer = Scorer(model, WORDS, 4096, World())
    batches = [[0, 1], [2], [3, 4], [5], [6, 5]]
    made = [*generated.answer_here(prompts, batches, how(seed=5), scorer)]
    assert begun == [[1, 2, 3]] and [begin for begin, _ in seen] == [
        [1, 2, 3], [1, 2, 3], None, None, None]  # a row is more than what it begins with
    assert [seeds for _, seeds in seen] == [
        [generate.row_seed(5, i) for i in batch] for batch in batches]
    assert made[0] == {0: {"text": "x", "stop": "eos"}, 1: {"text": "x", "stop": "eos"}}
    second = World()
    second.rank, second.size = 1, 2
    scorer.world = second
    found = [*generated.answer_here(prompts, batches, how(), scorer)]
    assert [sorted(one) for one in found] == [[2], [5]]


def test_how_far_answering_is_counts_every_row(model, monkeypatch):
    bars = []

    class Bar(generated.Progress):
        """Kept."""

        def __init__(self, *given):
            super().__init__(*given)
            bars.append((given, self))

    monkeypatch.setattr(generated, "Progress", Bar)
    scripted(monkeypatch, {})
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        world = World()
        world.rank, world.size = rank, size
        scorer = Scorer(model, WORDS, 4096, world)
        prompts = {i: [1] for i in range(5)}
        made = generated.generate_batches(prompts, [[0, 1], [2, 3], [4]], how(), scorer, None)
        assert len(made) == {(0, 1): 5, (0, 2): 3, (1, 2): 2}[rank, size]
        given, bar = bars[-1]
        assert given[:4] == ("answering", 5, "rows", rank == 0)
        assert bar.done == {(0, 1): 5, (0, 2): 5, (1, 2): 4}[rank, size]


def test_answers_of_a_cluster(model, monkeypatch, tmp_path):
    asked = []

    class There:
        """A cluster."""

        def __init__(self, address: str):
            asked.append(address)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            asked.append("closed")

        def choose_device(self, flags):
            asked.append((flags.dtype, flags.embed))

        def check(self, folder, files):
            asked.append((folder, files))

    def decoded_on(cluster, flags, folder, jobs):
        for job in jobs:
            yield SimpleNamespace(rows={one.number: {"completion": f"t{one.number}", "stop": "eos"}
                                        for one in job})

    monkeypatch.setattr(generated, "Cluster", There)
    monkeypatch.setattr(generated.decoding, "decoded_on", decoded_on)
    monkeypatch.setattr(generated.decoding, "Row", lambda number, ids: SimpleNamespace(
        number=number, ids=ids))
    scorer = Scorer(model, WORDS, 4096, World(), tmp_path)
    made = generated.generate_batches({0: [1], 1: [2]}, [[0], [1]], how(ray="a:1"), scorer, None)
    assert made == {i: {"text": f"t{i}", "stop": "eos"} for i in range(2)}
    assert asked == ["a:1", ("fp32", "none"), (tmp_path, []), "closed"]
    assert generated.generate_batches({}, [], how(ray="a:1"), scorer, None) == {}
    assert len(asked) == 4  # for nothing nobody is asked


def test_the_likeliest_tokens_behind_a_border(model):
    """A blank at the end of the prompt or the begin of the reference is the one between them; what
    has just room is computed."""
    scorer = Scorer(model, WORDS, 4096, World())
    block = model.config.block_size

    def best(ids: list[int], behind: list[int]) -> str:
        with torch.no_grad():
            logits = model(torch.tensor([ids + behind]))[0, len(ids) - 1:-1, :258]
        return WORDS.decode_behind(logits.argmax(-1).tolist())

    bos = WORDS.bos_id
    for text, reference, before in (("ab", "cd", "ab"), ("ab ", "cd", "ab"), ("ab", " cd", "ab")):
        [found] = generated.forced([row(text, reference)], scorer)
        assert found["content"] == best([bos, *WORDS.encode(before)], WORDS.encode(" cd"))
    for size, room in ((block - 2, True), (block - 1, False)):  # the letter itself is not read
        [found] = generated.forced([row("x" * size, "y")], scorer)
        assert bool(found["content"]) == room
    talk = generated.Row("q", None, [bos, 5, 6], says("yes"))
    [found] = generated.forced([talk], scorer)
    assert found["content"] == best([bos, 5, 6], WORDS.encode("yes"))
    twins = generated.forced([row("ab", "cd"), row("ab", "cd"), row("q", "r")], scorer)
    assert twins[0] == twins[1] != twins[2]


# ---- the command

@pytest.fixture
def home(tmp_path, monkeypatch, model):
    """A folder with a model and a run that has it as a checkpoint."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "model", model)
    shutil.copytree(tmp_path / "model", tmp_path / "out/r/checkpoints/step_5")
    write_json(tmp_path / "out/r/run.json", {"config": {}})
    write(tmp_path / "f.jsonl", *({"prompt": text, "reference": "one two three four"}
                                  for text in "abc"))
    (tmp_path / "out/r/checkpoints/step_5/training").mkdir()
    write_json(tmp_path / "out/r/checkpoints/step_5/training/state.json",
               {"format": 1, "step": 5, "rows": 1, "tokens": 9})
    return tmp_path


def score(*words: str) -> int:
    """eval.py of f.jsonl."""
    return eval.main(parse(["--generate=f.jsonl", "--device=cpu", *words], "", eval.Flags, "files"))


def test_scores_are_recorded_and_answers_are_not_made_twice(home, monkeypatch, capsys):
    seen = scripted(monkeypatch, {"a": "one two three four", "b": "one two three five"})
    command = ("--ckpt=out/r/checkpoints/step_5",)
    assert score(*command, "--metrics=exact,bleu") == 0
    assert sorted(itertools.chain(*seen)) == ["a", "b", "c"]
    kept = read_json(home / "out/r/eval/step_5.json")["tasks"]["generate:f.jsonl"]
    assert kept["exact_gen"] == pytest.approx(1 / 3) and kept["empty"] == 1
    assert kept["made_of"]["rows"] and kept["made_of"]["metric bleu"] is True
    assert "exact_gen" in capsys.readouterr().out
    seen.clear()
    assert score(*command, "--metrics=chrf") == 0 and seen == []  # only counted anew
    both = read_json(home / "out/r/eval/step_5.json")["tasks"]["generate:f.jsonl"]
    assert both["bleu_gen"] == kept["bleu_gen"] and "chrf_gen" in both
    assert set(both["intervals"]) == {"exact_gen", "bleu_gen", "chrf_gen"}
    assert score(*command, "--metrics=exact", "--max_new_tokens=9") == 0 and len(seen) == 1
    other = read_json(home / "out/r/eval/step_5.json")["tasks"]["generate:f.jsonl"]
    assert "bleu_gen" not in other  # of other answers
    assert score(*command, "--metrics=exact", "--dtype=bf16") == 0 and len(seen) == 2  # nor these
    seen.clear()
    write(home / "f.jsonl", {"prompt": "b", "reference": "z"})
    assert score(*command, "--metrics=exact") == 0 and seen == [["b"]]  # another file


def test_what_a_kill_leaves_is_not_generated_again(home, monkeypatch):
    """Killed in its second batch, with half a line on the disk."""
    seen = scripted(monkeypatch, dict.fromkeys("abc", "one two three four"))
    scripted_complete = generate.complete

    def killed(*args, **more):
        if len(seen) == 1:
            raise KeyboardInterrupt
        return scripted_complete(*args, **more)

    monkeypatch.setattr(generate, "complete", killed)
    command = ("--ckpt=out/r/checkpoints/step_5", "--batch_tokens=1", "--metrics=exact")
    with pytest.raises(KeyboardInterrupt):
        score(*command)
    [part] = (home / "out/r/eval/generated").iterdir()
    with open(part, "ab") as file:
        file.write(b'{"row": 1, "te')
    monkeypatch.setattr(generate, "complete", scripted_complete)
    first = list(seen)
    seen.clear()
    assert score(*command) == 0
    assert len(first) == 1 and sorted(itertools.chain(*first, *seen)) == ["a", "b", "c"]
    kept = read_json(home / "out/r/eval/step_5.json")["tasks"]["generate:f.jsonl"]
    assert kept["exact_gen"] == 1 and kept["intervals"]["exact_gen"] == [1, 1]


def test_all_checkpoints_are_scored_once_and_a_broken_one_says_so(home, monkeypatch, capsys):
    scripted(monkeypatch, {"a": "x"})
    monkeypatch.setattr(eval.checkpoint, "damage", lambda *_, **more: "")  # it has no checksums
    for said in ("generate:f.jsonl, 3 prompts", "step_5 has these scores"):
        assert score("--all=out/r", "--metrics=exact", "--stop=x,y") == 0
        assert said in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.chdir(home)
    broken = tiny()
    with torch.no_grad():
        broken.model.norm.weight[3] = math.nan
    write_checkpoint(home / "broken", broken)
    assert score("--ckpt=broken", "--metrics=exact") == 2
    assert "no generate:f.jsonl: what the model computes is not finite" in capsys.readouterr().out


def test_bad_input_of_the_command_is_one_line_and_exit_2(home):
    """Before the model is loaded: by real processes, of each kind one."""
    write(home / "bad.jsonl", {"prompt": "a", "reference": "b"}, "{broken")
    for words, said in (
            (["--generate=bad.jsonl"], "bad.jsonl:2: broken line"),
            (["--generate=f.jsonl", "--metrics=blau"], "not blau; did you mean bleu"),
            (["--generate=f.jsonl", "--stop=\\x"], "cannot use --stop=")):
        done = run_script("eval.py", "--ckpt=model", "--device=cpu", *words, cwd=home)
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.startswith("error: ") and said in done.stderr
        assert done.stderr.count("\n") == 1 and not (home / "generated").exists()


def test_flags_without_generate_have_no_effect_and_tasks_go_beside_it(home, monkeypatch, capsys):
    scripted(monkeypatch, {})
    eval.main(parse(["--ckpt=model", "--device=cpu", "--tasks=", "--metrics=bleu"], "",
                    eval.Flags, "files"))
    assert "note: --metrics has no effect here" in capsys.readouterr().out
    assert score("--ckpt=model", "--limit=2", "--log_samples", "--metrics=exact") == 0
    out = capsys.readouterr().out
    assert "tinyMMLU" not in out and "generate:f.jsonl, 2 prompts" in out
    [file] = home.glob("samples_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert [each["prompt"] for each in samples] == ["a", "b"]


# ---- along a run

def test_an_evaluation_answers_a_few_rows(home, monkeypatch):
    scripted(monkeypatch, {"a": "one two three four"})
    write(home / "f.jsonl", *({"prompt": "a", "reference": "one two three four"}
                              for _ in range(30)))
    config = Settings(eval_generate="f.jsonl", block_size=48)
    along = generated.RunAnswers(config, WORDS, World())
    assert along.how.max_new_tokens == len("one two three four") + generated.SPARE
    rows, lines = [], []
    log = SimpleNamespace(row=rows.append, say=lines.append)
    along.add(tiny(), 20, log)
    assert len(along.asked.rows) == generated.FEW
    assert rows[0]["step"] == 20 and rows[0]["bleu_gen"] == pytest.approx(100)
    assert lines == ["step 20: 16 answers to eval_generate: bleu_gen 100, chrf_gen 100, "
                     "exact_gen 1"]
    monkeypatch.undo()
    broken = tiny()
    with torch.no_grad():
        broken.model.norm.weight[3] = math.nan
    monkeypatch.chdir(home)
    along.add(broken, 40, log)
    assert len(rows) == 1 and "step 40: no answers to eval_generate: what the model" in lines[1]


TALES = [{"prompt": text, "reference": f"one two three {text}"} for text in "abcdefg"]


def test_a_run_logs_scores_and_two_ranks_score_as_one(data_home, tmp_path, monkeypatch, capsys):
    shutil.copytree(data_home / "data", tmp_path / "data")
    shutil.copy(data_home / "toy.py", tmp_path)
    write(tmp_path / "f.jsonl", *TALES)
    done = run_script("train.py", "toy.py", "--eval_generate=f.jsonl", "--max_steps=2",
                      "--eval_interval=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [row for row in metrics_of(tmp_path / "out/toy") if "chrf_gen" in row]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert done.stdout.count("7 answers to eval_generate: bleu_gen") == 3
    words = ["--ckpt=out/toy", "--json", "--metrics=bleu,exact,bleu_tf", "--max_new_tokens=6"]
    done = run_script("eval.py", "--generate=f.jsonl", "--seed=2", *words, processes=2,
                      cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    assert score(*words) == 0
    found = [json.loads(out.splitlines()[-1])["tasks"]["generate:f.jsonl"]
             for out in (done.stdout, capsys.readouterr().out)]
    assert [each.pop("made_of")["seed"] for each in found] == [2, 1337]  # which greedy ones ignore
    assert found[0] == found[1]
    assert len(list((tmp_path / "out/toy/eval/generated").iterdir())) == 3  # parts of 2 + 1 ranks


@pytest.mark.parametrize(("file", "said"), [
    ("gone.jsonl", "no file gone.jsonl"), ("f.jsonl", "f.jsonl:1: its `reference` is missing")])
def test_what_a_run_cannot_score_is_refused_before_it_begins(data_home, tmp_path, file, said):
    shutil.copytree(data_home / "data", tmp_path / "data")
    shutil.copy(data_home / "toy.py", tmp_path)
    write(tmp_path / "f.jsonl", {"prompt": "a"})
    done = run_script("train.py", "toy.py", f"--eval_generate={file}", cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- the page

def test_the_page_shows_scores_and_examples_escaped(tmp_path):
    task = {"bleu_gen": 31.5, "n": 9, "empty": 1, "intervals": {"bleu_gen": [20.0, 40.0]},
            "signatures": {"bleu_gen": "nrefs:1|tok:13a"}, "examples": [
                {"row": 3, "score": 0.0, "prompt": "<b>ask</b>", "answer": "<script>x</script>",
                 "reference": "a | b"}]}
    info = {"config": {}, "data": {}, "device": {}, "parameters": {}}
    rows = [{"step": 1, "bleu_gen": 10.0}, {"step": 2, "bleu_gen": 30.0}]
    run = RunFolder("out/r", info, rows, {}, [],
                    [{"step": 5, "tasks": {"generate:f.jsonl": task}}])
    twin = page.write_page([run], tmp_path / "p.html")
    html = (tmp_path / "p.html").read_text()
    body = html[:html.index("<script")]
    assert "31.5000 (20.000 to 40.000)" in body and "nrefs:1|tok:13a" in body
    assert "&lt;script&gt;x&lt;/script&gt;" in body and "<b>ask" not in body
    assert "a \\| b" in twin.read_text() and "BLEU of answers along the run" in body
