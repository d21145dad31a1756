"""Log-likelihoods as lm-eval's harness defines them, and lm-eval's tasks on our model: any of its
thousands by name, own ones with --include_path, and tinyMMLU, whose built-in form cannot be loaded
without a package that pip does not find."""

import difflib
import os
import urllib.error
import urllib.request
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

import irt
import settings
from log import Progress
from model import KVCache, LLaMA
from parallel import World
from settings import UserError
from tokenizer import Tokenizer

WORTH = 16  # tokens that rows must share before they are computed once for all of them

# The 100 questions of https://arxiv.org/abs/2402.14992. `input_formatted` is a whole prompt, five
# worked examples included. lm-eval's task of this name shows gpirt under the name acc_norm; here
# acc is the accuracy, and irt.py estimates.
TINY_MMLU: dict = {
    "task": "tinyMMLU", "dataset_path": "tinyBenchmarks/tinyMMLU", "dataset_name": "all",
    "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{input_formatted}}",
    "doc_to_choice": ["A", "B", "C", "D"], "doc_to_target": "answer", "num_fewshot": 0,
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}

Ids = tuple[int, ...]
Group = tuple[int, list[Ids]]  # rows, and how many tokens all of them begin with


class Unavailable(Exception):
    """A task whose library or data cannot be had here; the other scores still come."""


# ---- the model as a scorer of texts

class Scorer:
    """Log-likelihoods of continuations, computed as lm-eval's `hf` model does: context and
    continuation encoded together, begin token in front as in training, too long ones cut at the
    left, right padding, fp32 log-softmax. What several rows begin with is computed once, and the
    output matrix is read at the scored positions only. Ranks share the passes and all get all the
    results."""

    def __init__(self, model: LLaMA, tokenizer: Tokenizer, batch_tokens: int, world: World):
        self.model, self.tokenizer, self.world = model, tokenizer, world
        self.batch_tokens = batch_tokens
        self.block_size = model.config.block_size
        self.begin = [tokenizer.bos] if tokenizer.bos is not None else []
        self.truncated: set = set()  # hashes of the contexts that were cut
        self.samples: dict[str, list[dict]] = {}  # by task, in lm-eval's form

    def encode(self, text: str) -> list[int]:
        """Ids of a text at the start of a document."""
        return self.begin + self.tokenizer.encode(text)

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """(context ids, continuation ids), the harness's way: spaces at the end of the context
        belong to the continuation, and the border is where the context's own ids end."""
        bare = context.rstrip()
        if not bare:
            return self.begin, self.tokenizer.encode(context + continuation)
        before, whole = self.encode(bare), self.encode(context + continuation)
        return before, whole[len(before):]

    @torch.no_grad()
    def score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each continuation.

        Pairs that differ in their last token only share one row. Collective.
        """
        serves: dict[Ids, list[int]] = {}  # ids that the model reads -> pairs
        for i, (context, continuation) in enumerate(pairs):
            if not continuation:
                raise UserError("the tokenizer merges a continuation into its context, so nothing "
                                "is left to score; begin the continuation with a space")
            ids = (context + continuation)[-(self.block_size + 1):]
            serves.setdefault(tuple(ids[:-1]), []).append(i)
            if len(context) + len(continuation) > self.block_size + 1:
                self.truncated.add(hash(tuple(context)))
        # how many of a row's positions are scored: as many as the longest continuation has
        wanted = {row: min(max(len(pairs[i][1]) for i in serves[row]), len(row)) for row in serves}
        results = torch.zeros(len(pairs), 2, dtype=torch.float64)
        progress = Progress("scoring", len(serves), "prompts", self.world.rank == 0,
                            self.world.device.type)
        batches = self.batches(self.groups(wanted))
        for batch in batches[self.world.rank::self.world.size]:
            rows = [row for _, members in batch for row in members]
            counts = [wanted[row] for row in rows]
            log_p = self.model.lm_head(self.states(batch, counts)).float().log_softmax(-1)
            for row, scored in zip(rows, log_p.split(counts), strict=True):
                for i in serves[row]:
                    target = torch.tensor(pairs[i][1][-len(row):], device=scored.device)
                    last = scored[-len(target):]
                    results[i, 0] = last.gather(1, target[:, None]).sum().item()
                    results[i, 1] = float((last.argmax(-1) == target).all())
            progress.add(min(len(rows) * self.world.size, len(serves) - progress.done))
        progress.close()
        return [(value, greedy > 0) for value, greedy in self.world.sum(results).tolist()]

    def groups(self, wanted: dict[Ids, int]) -> list[Group]:
        """Rows in groups whose beginning is computed once; `wanted`: positions scored of each,
        which lie behind it. In order of their ids neighbours have most in common: a row joins the
        one before as long as that saves more tokens than it costs the others."""
        groups: list[Group] = []
        for row in sorted(wanted):
            free = len(row) - wanted[row]
            common, rows = groups[-1] if groups else (0, [])
            both = min(common, free, common_length(rows[-1], row) if rows else 0)
            longest = max(len(row), *map(len, rows), 0)
            if (both >= WORTH and len(rows) * both >= (len(rows) - 1) * common
                    and (len(rows) + 1) * longest <= self.batch_tokens):
                groups[-1] = (both, [*rows, row])
            else:
                groups.append((free, [row]))
        return groups

    def batches(self, groups: list[Group]) -> list[list[Group]]:
        """Groups that go through the model together: batch_tokens in the rectangle that the rows
        fill, unless padding costs more than going apart; those that share a beginning apart from
        those that are alone."""
        def alone(group: Group) -> bool:
            return len(group[1]) == 1

        def sizes(batch: list[Group]) -> tuple[int, int, int]:
            """Rows, the longest beginning, the longest rest."""
            begin = 0 if alone(batch[0]) else max(common for common, _ in batch)
            rest = max(len(row) - (0 if alone(batch[0]) else common)
                       for common, rows in batch for row in rows)
            return sum(len(rows) for _, rows in batch), begin, rest

        def cost(batch: list[Group]) -> int:
            rows, begin, rest = sizes(batch)
            return len(batch) * begin + rows * rest

        batches: list[list[Group]] = []
        for group in sorted(groups, key=lambda one: (
                alone(one), 0 if alone(one) else one[0], max(map(len, one[1]))), reverse=True):
            last = batches[-1] if batches else []
            rows, begin, rest = sizes([*last, group])
            if (last and alone(last[0]) == alone(group) and begin + rest <= self.block_size
                    and rows * (begin + rest) <= self.batch_tokens
                    and cost([*last, group]) <= 1.1 * (cost(last) + cost([group]))):
                last.append(group)
            else:
                batches.append([group])
        return batches

    def states(self, batch: list[Group], counts: list[int]) -> Tensor:
        """The last `counts` states of every row, end to end (sum of counts, C)."""
        rows = [row for _, members in batch for row in members]
        if len(rows) == len(batch):
            ends, states = [len(row) for row in rows], self.model.hidden(self.padded(rows))
        else:
            model, device = self.model, self.world.device
            begins = [members[0][:common] for common, members in batch]
            owner = torch.tensor([i for i, (_, members) in enumerate(batch) for _ in members],
                                 device=device)
            rests = [row[common:] for common, members in batch for row in members]
            begin, longest = max(map(len, begins)), max(map(len, rests))
            once = KVCache(model.config, len(begins), begin, device, model.compute_dtype)
            model.hidden(self.padded(begins), once)
            once.lengths = torch.tensor([len(ids) for ids in begins], device=device)
            cache = KVCache(model.config, len(rows), begin + longest, device, model.compute_dtype)
            cache.k[:, :, :, :begin] = once.k[:, owner]
            cache.v[:, :, :, :begin] = once.v[:, owner]
            cache.lengths, cache.used = once.lengths[owner], begin
            ends, states = [len(rest) for rest in rests], model.hidden(self.padded(rests), cache)
        return torch.cat([one[end - count:end] for one, end, count in
                          zip(states, ends, counts, strict=True)])

    def padded(self, rows: list) -> Tensor:
        """Rows of ids as a rectangle (B, T), filled up at the right with an id that no earlier
        position sees."""
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for one, row in zip(ids, rows, strict=True):
            one[:len(row)] = torch.tensor(row)
        return ids.to(self.world.device)

    def keep(self, name: str, items: Iterable, values: list[list[tuple]], right) -> None:
        """Remember what was asked and answered in `samples`."""
        self.samples[name] = [
            {"doc_id": i, "target": str(item.right), "arguments": item.pairs,
             "resps": [[value] for value in row], "acc": float(hit)}
            for i, (item, row, hit) in enumerate(zip(items, values, right, strict=True))]


def common_length(one: Ids, other: Ids) -> int:
    """How many tokens both begin with."""
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


# ---- lm-eval

def lm_eval_model(scorer: Scorer):
    """lm-eval's view of a Scorer. Every rank runs the whole harness and sees all the results
    in document order: its own way of sharing the work mixes the order."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    class Model(TemplateLM):
        """The methods that lm-eval calls."""

        @property
        def eot_token_id(self) -> int:
            """What an empty context is replaced by: the begin token, as in training."""
            return scorer.begin[0]

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
            """Ids, with the begin token unless it is declined."""
            return (scorer.tokenizer.encode(string) if add_special_tokens is False
                    else scorer.encode(string))

        def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
            return scorer.score([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            """Log-likelihood of whole texts, in windows as the `hf` model cuts them."""
            texts = [[utils.make_disjoint_window(window) for window in
                      utils.get_rolling_token_windows(
                          token_list=scorer.encode(request.args[0]), context_len=1,
                          prefix_token=self.eot_token_id, max_seq_len=scorer.block_size)]
                     for request in requests]
            values = iter(scorer.score([window for windows in texts for window in windows]))
            return [sum(next(values)[0] for _ in windows) for windows in texts]

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            """Greedy continuations; half of the context at least is left to the prompt."""
            import generate

            answers = []
            for text, options in (request.args for request in requests):
                ids, until = scorer.encode(text), options.get("until") or []
                until = [until] if isinstance(until, str) else list(until)
                room = min(options.get("max_gen_toks", 256), scorer.block_size // 2)
                if len(ids) + room > scorer.block_size:
                    scorer.truncated.add(hash(tuple(ids)))
                [(_, answer, _)] = generate.complete(
                    scorer.model, scorer.tokenizer, [ids[room - scorer.block_size:]], room,
                    settings.Sampling(temperature=0.0), [0], until)
                answers.append(answer)
            return answers

    return Model()


@cache
def task_manager(defaults: bool, include_path: str = ""):
    """lm-eval's finder of tasks; `defaults`: with its own thousands, which takes a while;
    `include_path`: with those of this folder."""
    # Without a network the hub's client retries for long; told so, it takes its cache at once. It
    # reads the variables when it is imported.
    if "HF_HUB_OFFLINE" not in os.environ:
        try:
            hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
            urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=5).close()
        except (OSError, ValueError) as error:
            if not hasattr(error, "code"):  # an HTTP error is an answer
                os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ |= {"TQDM_DISABLE": "1", "LMEVAL_LOG_LEVEL": "ERROR"}
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults, include_path=include_path or None)


def load_task(name: str, include_path: str = "") -> dict[str, Any]:
    """What a name stands for, its data downloaded: {tasks: {name: task}, groups, group_map}."""
    if include_path and not os.path.isdir(include_path):
        raise UserError(f"no folder {include_path}; --include_path holds lm-eval's .yaml files")
    tiny = False
    try:
        manager = task_manager(False, include_path)
        if name not in manager.all_tasks:
            tiny = name == TINY_MMLU["task"]
            manager = manager if tiny else task_manager(True, include_path)
        if tiny or name in manager.all_tasks:
            return manager.load([TINY_MMLU if tiny else name])
    except ImportError as error:
        raise Unavailable(f"{error}; {settings.install('eval')}") from None
    except Exception as error:  # whatever the library, its plug-ins or the network raise
        source = f"data set {TINY_MMLU['dataset_path']}" if tiny else "its data"
        cache = os.environ.get("HF_HOME") or "~/.cache/huggingface"
        raise Unavailable(f"{source} cannot be had from huggingface.co, nor from its cache "
                          f"{cache}; run it once with a network, or copy that folder from a "
                          f"machine that did ({' '.join(str(error).split())[:160]})") from None
    near = ", ".join(difflib.get_close_matches(name, manager.all_tasks, 4, 0.5))
    raise UserError(f"no task {name}; {f'near it: {near}; ' if near else ''}`lm-eval ls tasks` "
                    "lists all, a file of your own is local:FILE.jsonl")


def questions(loaded: dict, limit: int) -> list[str]:
    """The texts that tasks ask about, without worked examples."""
    found = []
    for task in loaded["tasks"].values():
        for doc in list(task.eval_docs)[:limit or None]:
            asked = doc.get("question")
            found.append(asked if isinstance(asked, str) else str(task.doc_to_text(doc)))
    return found


def score(name: str, loaded: dict, limit: int, anchors: tuple | None,
          scorer: Scorer) -> dict:
    """{task: metrics} of lm-eval's tasks; `name` also stands for the members of a group.
    `anchors`: what irt.load gave, if the task is tinyMMLU."""
    from lm_eval import simple_evaluate

    members = {member for group in loaded["group_map"].values() for member in group}
    wanted = [one for key, one in [*loaded["groups"].items(), *loaded["tasks"].items()]
              if key not in members]
    output = simple_evaluate(lm_eval_model(scorer), tasks=wanted, limit=limit or None,
                             task_manager=task_manager(False), bootstrap_iters=1000)
    scores: dict = {}
    for task, values in output["results"].items() if output else ():
        # 'acc,none' is the metric acc through the filter none
        scores[task] = {key.removesuffix(",none"): value for key, value in values.items()
                        if isinstance(value, float)}
        samples = [one for one in output["samples"].get(task, ()) if one["filter"] == "none"]
        samples.sort(key=lambda one: one["doc_id"])
        if output["configs"].get(task, {}).get("output_type") == "multiple_choice" and samples:
            scores[task]["chance"] = sum(1 / len(s["resps"]) for s in samples) / len(samples)
            scorer.samples[task] = [{key: one[key] for key in (
                "doc_id", "target", "arguments", "resps", "acc", "acc_norm") if key in one}
                for one in samples]
        scores[task]["n"] = len(samples) or values.get("sample_len")
        if anchors:
            prompt = samples[0]["arguments"][0][0]
            right, likely = irt.answers(scorer.samples[task], name)
            scores[task] |= likely | {"shots": prompt.count("\nAnswer:") - 1}
            scores[task] |= irt.scores(right, anchors)
    if name in scores or len(scores) == 1:  # prompts are counted over the members of a group
        scores[name if name in scores else next(iter(scores))]["truncated"] = len(scorer.truncated)
    return scores
