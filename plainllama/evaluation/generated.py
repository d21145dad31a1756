"""Generated answers scored: eval.py --generate=FILE, and along a run the key eval_generate.

The answer to each row's prompt is generated, greedily unless told otherwise, and compared with the
row's references. It is kept beside the run, under what decides it, and not generated again. Scores
end in _gen; that of the tokens that are likeliest behind the true reference is bleu_tf.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch.nn.attention import sdpa_kernel

from model import ANY_SHAPE, LLaMA
from plainllama.cluster import Cluster
from plainllama.evaluation import metrics
from plainllama.evaluation.likelihood import WORTH, Scorer, common_length
from plainllama.evaluation.tasks import Task
from plainllama.files import run_of, sha256_bytes
from plainllama.generation import decoding, generate
from plainllama.generation.prompt_files import Journal
from plainllama.parallel import World
from plainllama.progress import Progress
from plainllama.settings import Sampling, Settings, UserError
from plainllama.text.dialogs import ROWS, Refused, asked, canonical, message_of
from plainllama.text.documents import Tally, documents
from plainllama.text.sources import survey
from plainllama.tokens.chat import END, written
from plainllama.tokens.templates import chat_of
from plainllama.tokens.tokenizer import Tokenizer

FIELDS = ("prompt", "messages", "tools", "reference")
DECIDES = ("fields", "chat", "max_new_tokens", "stop", "temperature", "top_p", "seed")
FEW = 16  # rows that an evaluation along a run answers
SPARE = 16  # tokens that such an answer may be longer than the longest reference
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SHOWN, MOST = 4, 1000  # of the worst and of the best answers in a report; characters of each text
TOO_LONG = {"text": "", "stop": "too long"}  # what is made of a prompt without room


class Row(NamedTuple):
    """What is asked, and the messages of which one would be right."""

    shown: str  # the prompt, for people
    text: str | None  # the prompt, None of a dialog
    ids: list[int]
    references: list[dict]


class Asked(NamedTuple):
    """The rows of a file, and by what they are scored."""

    rows: list[Row]
    metrics: list[str]
    bleu_tokenizer: str
    digest: str  # of all that the rows say


# ---- rows

def read(how: Any, tokenizer: Tokenizer, block_size: int) -> Asked:
    """Read the file how.generate. UserError for the first row that is wrong, and for what cannot be
    scored of them."""
    file, fields = how.generate, how.fields or {}
    if not Path(file).is_file():
        raise UserError(f"no file {file}; name rows of `prompt` or `messages`, and `reference`")
    if not (isinstance(fields, dict) and fields.keys() <= set(FIELDS)):
        raise UserError(f"--fields={fields}: say {{'prompt': 'YOURS', 'reference': 'YOURS'}}; ours "
                        f"are {', '.join(FIELDS)}")
    _, parts = survey({"path": file, "converter": ROWS, "fields": fields},
                      documents="chat", train_on="all")
    dropped = Tally()
    found = list(documents(parts, dropped))
    for rule, entry in dropped.items():
        raise UserError(f"{entry['first']}: {rule}; rows are objects with {', '.join(FIELDS)}")
    knows_dialogs = bool(tokenizer.template) or END in tokenizer.special_ids
    talks, rows = how.chat == "true" or (how.chat == "auto" and knows_dialogs), []
    for text in found[:how.limit or None]:
        try:
            rows.append(row_of(json.loads(text), tokenizer, talks))
        except Refused as error:
            what = f"{error}: {error.found}" if error.found else str(error)
            raise UserError(f"{text.where()}: {what}") from None  # type: ignore[attr-defined]
    if all(len(row.ids) >= block_size for row in rows):
        raise UserError(f"{file}: no prompt has room in a context of {block_size} tokens")
    references = [row.references for row in rows]
    by = how.bleu_tokenizer if how.bleu_tokenizer != "auto" else metrics.tokenizer_for(references)
    return Asked(rows, metrics.chosen(how.metrics, references, by), by,
                 sha256_bytes("\n".join(found[:how.limit or None]).encode()))


def row_of(record: dict, tokenizer: Tokenizer, talks: bool) -> Row:
    """Read a row; `talks`: a prompt is the question of a dialog. Refused if it is wrong."""
    there = [name for name in ("prompt", "messages") if record.get(name) is not None]
    if len(there) != 1:
        raise Refused("a row has both prompt and messages" if there else "a row has neither prompt "
                      "nor messages (--fields names others)", ", ".join(record))
    prompt, reference = record[there[0]], record.get("reference")
    if isinstance(prompt, str) and not talks:
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        return Row(prompt, prompt, ids, references_of(reference))
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if reference is None and isinstance(messages, list) and len(messages) > 1:  # a whole dialog
        *messages, reference = messages
    messages, tools = asked(record | {"messages": messages})
    shown = "\n".join(f"{message['role']}: {written(message)}" for message in messages)
    return Row(shown, None, chat_of(tokenizer).prompt(messages, tools), references_of(reference))


def references_of(given: Any) -> list[dict]:
    """Read a text or a message, or a list of them. Refused if there is none."""
    found = []
    for one in given if isinstance(given, list) else [given]:
        if not isinstance(one, str | dict):
            what = "no text, no message and no list of these" if one is not None else "missing"
            raise Refused(f"its `reference` is {what} (--fields names another)", repr(one))
        raw = {"role": "assistant", "content": ""} | (one if isinstance(one, dict) else {})
        message = canonical(message_of(raw)) if isinstance(one, dict) else raw | {"content": one}
        says = message["content"].strip() or "tool_calls" in message
        if message["role"] != "assistant" or not says:
            raise Refused("its reference is no answer, or an empty one", repr(one))
        found.append(message)
    return found or references_of(None)


# ---- answers

def tried(call: Any, *args) -> tuple[Any, str]:
    """Give what a call gives and '', or None and what the user can mend, which all ranks shall
    know."""
    try:
        return call(*args), ""
    except UserError as error:
        return None, str(error)


def batches_of(prompts: dict[int, list[int]], size: int) -> list[list[int]]:
    """Gather rows in batches of like length; if a batch or more begin alike, they go together."""
    begins = {i: tuple(ids[:WORTH]) for i, ids in prompts.items()}
    count = Counter(begins.values())
    least = min(size, len(prompts))
    order = sorted(prompts, key=lambda i: (
        begins[i] if count[begins[i]] >= least else (), -len(prompts[i]), i))
    return [order[first:first + size] for first in range(0, len(order), size)]


def generated(rows: list[Row], how: Any, scorer: Scorer) -> list[dict]:
    """Give {text, stop} of each row, from the journal or generated now. Collective."""
    world, size = scorer.world, max(1, scorer.batch_tokens // scorer.block_size)
    journal = journal_of(how, scorer.folder) if scorer.folder else None
    reads = journal.read if journal and world.rank == 0 else dict
    made, problem = world.agree(tried(reads))
    if problem:
        raise UserError(problem)
    prompts = {i: row.ids for i, row in enumerate(rows)
               if i not in made and len(row.ids) < scorer.block_size}
    new, problem = tried(generate_batches, prompts, batches_of(prompts, size), how, scorer, journal)
    everyone = world.gather((new, problem))
    for part, problem in everyone:
        if problem:
            raise UserError(problem)
        made |= part
    return [made.get(i, TOO_LONG) for i in range(len(rows))]


def generate_batches(prompts: dict[int, list[int]], batches: list[list[int]], how: Any,
                     scorer: Scorer, journal: Journal | None) -> dict[int, dict]:
    """Generate this rank's share, {row: {text, stop}}, and write it down batch by batch; what the
    prompts of a batch begin with is computed once, and again only where another begins so."""
    world = scorer.world
    made: dict[int, dict] = {}
    if journal:
        journal.begin(world.rank)
    progress = Progress("answering", len(prompts), "rows", world.rank == 0, world.device.type)
    answer = answer_there if getattr(how, "ray", "") and batches else answer_here
    for new in answer(prompts, batches, how, scorer):
        if journal:
            journal.add(new)
        made |= new
        progress.add(min(len(new) * world.size, len(prompts) - progress.done))
    progress.close()
    if journal:
        journal.file.close()
    return made


def answer_here(prompts: dict[int, list[int]], batches: list[list[int]], how: Any,
                scorer: Scorer) -> Iterator[dict[int, dict]]:
    """Give {row: {text, stop}} of each batch of this rank."""
    begin: list[int] = []
    cache = None
    for batch in batches[scorer.world.rank::scorer.world.size]:
        ids = [prompts[i] for i in batch]
        shared = min(common_length(ids[0], row[:-1]) for row in ids)
        if not begin or shared < len(begin) or ids[0][:len(begin)] != begin:
            begin = ids[0][:shared] if shared >= WORTH and len(ids) > 1 else []
            cache = generate.begun(scorer.model, begin) if begin else None
        texts = generate.complete(
            scorer.model, scorer.tokenizer, ids, how.max_new_tokens, how,
            [generate.row_seed(how.seed, i) for i in batch], how.stop, begin=cache)
        yield {i: {"text": text.text, "stop": text.ended}
               for i, text in zip(batch, texts, strict=True)}


def answer_there(prompts: dict[int, list[int]], batches: list[list[int]], how: Any,
                 scorer: Scorer) -> Iterator[dict[int, dict]]:
    """Give {row: {text, stop}} of each batch, as the nodes of a cluster make it, in our dtype."""
    assert scorer.folder
    there = SimpleNamespace(**vars(how) | {"embed": "none",
                                           "dtype": NAMES[scorer.model.compute_dtype]})
    with Cluster(how.ray) as cluster:
        cluster.choose_device(there)
        cluster.check(scorer.folder, [])
        jobs = [[decoding.Row(i, prompts[i]) for i in batch] for batch in batches]
        for made in decoding.decoded_on(cluster, there, scorer.folder, jobs):
            yield {i: {"text": new["completion"], "stop": new["stop"]}
                   for i, new in made.rows.items()}


def journal_of(how: Any, folder: Path) -> Journal:
    """Open the journal of what is generated by a checkpoint; its name says what decides that."""
    run = run_of(folder)
    kept = (run / "eval" if run else Path()) / "generated"
    kept.mkdir(parents=True, exist_ok=True)
    decides = {name: getattr(how, name) for name in (*DECIDES, "base")}
    decides["as_dialogs"] = decides.pop("chat", None)  # sample.py's --chat decides nothing
    journal = Journal(SimpleNamespace(out="", prompts=how.generate, tools="", template="",
                                      **decides), folder, how.dtype)
    recipe = json.dumps(journal.recipe).encode()
    journal.out = kept / f"{folder.name}-{sha256_bytes(recipe)[:12]}"
    return journal


@torch.no_grad()
@sdpa_kernel(ANY_SHAPE)
def forced(rows: list[Row], scorer: Scorer) -> list[dict]:
    """Give, as messages, the tokens that are likeliest behind each row's prompt and every beginning
    of its first reference; '' where the context is too short for these. Collective."""
    wanted: dict[tuple, int] = {}  # ids that the model reads -> how many are compared
    serves: dict[tuple, list[int]] = {}
    for i, row in enumerate(rows):
        text, before = row.references[0]["content"], row.ids
        behind = [int(j) for j in scorer.tokenizer.encode_behind(text)]
        if row.text is not None:
            spaced = row.text[-1:].isspace() or text[:1].isspace()
            before, behind = scorer.pair(row.text, text if spaced else f" {text}")
        ids = tuple(before + behind)[:-1]
        if behind and len(ids) <= scorer.block_size:
            wanted[ids] = max(len(behind), wanted.get(ids, 0))
            serves.setdefault(ids, []).append(i)
    texts: dict[int, str] = {}
    for batch in scorer.batches(scorer.groups(wanted))[scorer.world.rank::scorer.world.size]:
        counts = [wanted[ids] for ids in batch.rows]
        logits = scorer.model.lm_head(scorer.states(batch, counts))
        best = logits[:, :scorer.tokenizer.vocab_size].argmax(-1).cpu()
        for ids, found in zip(batch.rows, best.split(counts), strict=True):
            texts |= dict.fromkeys(serves[ids], scorer.tokenizer.decode_behind(found.tolist()))
    for part in scorer.world.gather(texts):
        texts |= part
    return [{"content": texts.get(i, "")} for i in range(len(rows))]


# ---- scores

def score(name: str, asked: Asked, how: Any, scorer: Scorer) -> dict:
    """Score a file's rows, {name: metrics}. Collective."""
    rows, references = asked.rows, [row.references for row in asked.rows]
    behind_truth = forced(rows, scorer) if metrics.FORCED in asked.metrics else []
    made, answers = [], []
    if set(asked.metrics) != {metrics.FORCED}:
        made = generated(rows, how, scorer)
        for row, new in zip(rows, made, strict=True):
            answers.append({"role": "assistant", "content": new["text"]} if row.text is not None
                           else generate.message_of(chat_of(scorer.tokenizer), new["text"]))
    found, each = metrics.scores(asked.metrics, answers, behind_truth, references,
                                 asked.bleu_tokenizer)
    found["n"] = len(rows)
    if made:
        stops = Counter(new["stop"] for new in made)
        found |= {"too_long": stops["too long"], "unfinished": stops["length"],
                  "empty": sum(not new["text"].strip() for new in made)}
        samples = scorer.samples[name] = [
            {"doc_id": i, "prompt": row.shown, "target": row.references, "resps": [[answer]],
             "stop": new["stop"], "score": each.get(i)}
            for i, (row, answer, new) in enumerate(zip(rows, answers, made, strict=True))]
        order = sorted(each, key=lambda i: (each[i], i))
        shown = dict.fromkeys([*order[:SHOWN], *order[SHOWN:][-SHOWN:]])
        found["examples"] = [example(samples[i]) for i in shown]
    return {name: found}


def example(sample: dict) -> dict:
    """Say what was asked, answered and right, for a report."""
    references = "\n— or —\n".join(map(written, sample["target"]))
    return {"row": sample["doc_id"] + 1, "score": sample["score"],
            "prompt": sample["prompt"][-MOST:], "answer": written(sample["resps"][0][0])[:MOST],
            "reference": references[:MOST]}


def make_task(flags: Any, tokenizer: Tokenizer, block_size: int, dtype: torch.dtype,
              world: World) -> dict[str, Task]:
    """Make --generate a task. UserError, before a model is loaded, for what does not fit.
    Collective."""
    decides = {"stop": generate.stops_of(flags.stop), "dtype": dtype}
    how = SimpleNamespace(**vars(Sampling()) | vars(flags) | decides)
    asked = world.decide(lambda: read(how, tokenizer, block_size))
    made_of = {"rows": asked.digest, "bleu_tokenizer": asked.bleu_tokenizer,
               **{key: getattr(how, key) for key in DECIDES},
               **{f"metric {metric}": True for metric in asked.metrics}}
    name = f"generate:{flags.generate}"
    return {name: Task(partial(score, name, asked, how), lambda: [row.shown for row in asked.rows],
                       [name], made_of)}


class RunAnswers:
    """The answers that a run gives at each evaluation to the first rows of eval_generate, scored:
    greedy ones, a few tokens longer than the longest reference."""

    name = "answers to eval_generate"

    def __init__(self, config: Settings, tokenizer: Tokenizer, world: World):
        self.tokenizer, self.world, self.room = tokenizer, world, FEW * config.block_size
        self.how = SimpleNamespace(
            **vars(Sampling(temperature=0)), generate=config.eval_generate, fields=None,
            chat="auto", limit=FEW, metrics="", bleu_tokenizer="auto", stop=[], seed=config.seed)
        asked = read(self.how, tokenizer, config.block_size)
        quick = [metric for metric in asked.metrics if metric != "rouge"]  # which loads for seconds
        self.asked = asked._replace(metrics=quick)
        right = [one for row in self.asked.rows for one in row.references]
        self.how.max_new_tokens = SPARE + max(len(tokenizer.encode(written(one))) for one in right)

    def add(self, model: LLaMA, step: int, log: Any) -> None:
        """Answer, write the scores down and say them. A model that gives nothing to draw from does
        not end its run. Collective."""
        scorer = Scorer(model, self.tokenizer, self.room, self.world)
        found, problem = tried(score, "run", self.asked, self.how, scorer)
        if problem:
            log.say(f"step {step}: no {self.name}: {problem}")
            return
        values = {key: value for key, value in found["run"].items() if key.endswith("_gen")}
        log.row({"step": step, **values, "time": time.time()})
        said = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        log.say(f"step {step}: {len(self.asked.rows)} {self.name}: {said}")
