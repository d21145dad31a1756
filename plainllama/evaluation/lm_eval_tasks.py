"""Log-likelihoods as lm-eval's harness defines them, and lm-eval's tasks on our model: any of its
thousands by name, own ones with --include_path, and tinyMMLU, whose built-in form cannot be loaded
without a package that pip does not find."""

import importlib.metadata
import itertools
import json
import os
import re
import urllib.request
from functools import cache
from typing import Any

from plainllama import settings
from plainllama.evaluation import irt
from plainllama.evaluation.likelihood import Scorer
from plainllama.files import sha256_bytes
from plainllama.settings import UserError

# The 100 questions of https://arxiv.org/abs/2402.14992. `input_formatted` is a whole prompt, five
# worked examples included. lm-eval's task of this name shows gpirt under the name acc_norm; here
# acc is the accuracy, and irt.py estimates.
TINY_MMLU: dict = {
    "task": "tinyMMLU", "dataset_path": "tinyBenchmarks/tinyMMLU", "dataset_name": "all",
    "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{input_formatted}}",
    "doc_to_choice": ["A", "B", "C", "D"], "doc_to_target": "answer", "num_fewshot": 0,
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


class Unavailable(Exception):
    """A task's library or data is unavailable here; the other scores still come."""


# ---- lm-eval

def lm_eval_model(scorer: Scorer):
    """Show a Scorer as lm-eval's model. Every rank runs the whole harness and sees all the results
    in document order: its own way of sharing the work mixes the order."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    class Model(TemplateLM):
        """The methods that lm-eval calls."""

        @property
        def eot_token_id(self) -> int:
            """Give what replaces an empty context: the begin token, as in training."""
            return scorer.tokenizer.bos_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
            """Encode a text, with the begin token in front unless it is declined."""
            with_begin = add_special_tokens is not False
            return scorer.encode(string) if with_begin else scorer.tokenizer.encode(string)

        def _loglikelihood_tokens(self, requests, **_) -> list:
            return scorer.score([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            """Score whole texts, in windows as the `hf` model cuts them."""
            texts = [list(map(utils.make_disjoint_window, utils.get_rolling_token_windows(
                scorer.encode(request.args[0]), self.eot_token_id, scorer.block_size, 1)))
                for request in requests]
            scored = iter(scorer.score(list(itertools.chain(*texts))))
            return [sum(next(scored).nats for _ in windows) for windows in texts]

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            """Go on greedily; half of the context at least is left to the prompt."""
            from plainllama.generation import generate

            answers = []
            for text, options in (request.args for request in requests):
                ids, until = scorer.encode(text), options.get("until") or []
                until = [until] if isinstance(until, str) else list(until)
                room = min(options.get("max_gen_toks", 256), scorer.block_size // 2)
                if len(ids) + room > scorer.block_size:
                    scorer.truncated.add(hash(tuple(ids)))
                answers += [completion.text for completion in generate.complete(
                    scorer.model, scorer.tokenizer, [ids[room - scorer.block_size:]], room,
                    settings.Sampling(temperature=0.0), [0], until)]
            return answers

    return Model()


@cache
def task_manager(defaults: bool, include_path: str = ""):
    """Make lm-eval's finder of tasks; `defaults`: with its own thousands, which takes a while;
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
    """Load what a name stands for, with its data: {tasks: {name: task}, groups, group_map}.
    Unavailable if it is not on this machine and not to be downloaded."""
    if include_path and not os.path.isdir(include_path):
        raise UserError(f"no folder {include_path}; --include_path holds lm-eval's .yaml files")
    try:
        manager = task_manager(False, include_path)
        if name == TINY_MMLU["task"] and name not in manager.all_tasks:
            return manager.load([TINY_MMLU])
        if name not in manager.all_tasks:
            manager = task_manager(True, include_path)
        if name in manager.all_tasks:
            return manager.load([name])
    except ImportError as error:
        raise Unavailable(f"{error}; {settings.install('eval')}") from None
    except Exception as error:  # whatever the library, its plug-ins or the network raise
        cache = os.environ.get("HF_HOME") or "~/.cache/huggingface"
        raise Unavailable(f"no data from huggingface.co or in {cache}, a folder to copy from "
                          f"elsewhere ({' '.join(str(error).split())[:160]})") from None
    raise UserError(f"no task {name}{settings.nearest(name, manager.all_tasks)}; a file is "
                    "local:FILE.jsonl, and `lm-eval ls tasks` lists all others")


def hash_of(loaded: dict) -> str:
    """Hash what tasks ask, of which data and how, and by which version of the harness."""
    asked: list = [importlib.metadata.version("lm_eval")]
    for name, task in loaded["tasks"].items():
        asked += [name, task.dump_config(), list(task.eval_docs)]
    text = json.dumps(asked, default=repr, sort_keys=True)
    return sha256_bytes(re.sub(" at 0x[0-9a-f]+", "", text).encode())


def questions(loaded: dict, limit: int) -> list[str]:
    """List the texts that tasks ask about, without worked examples."""
    docs = [(task, doc) for task in loaded["tasks"].values()
            for doc in list(task.eval_docs)[:limit or None]]
    return [doc["question"] if isinstance(doc.get("question"), str) else str(task.doc_to_text(doc))
            for task, doc in docs]


def score(name: str, loaded: dict, limit: int, known: irt.Known | None, scorer: Scorer) -> dict:
    """Score lm-eval's tasks, {task: metrics}; `name` also stands for the members of a group.
    `known`: irt's parameters, if the task is tinyMMLU."""
    from lm_eval import simple_evaluate

    members = set(itertools.chain(*loaded["group_map"].values()))
    named = loaded["groups"] | loaded["tasks"]
    wanted = [task for key, task in named.items() if key not in members]
    output = simple_evaluate(lm_eval_model(scorer), tasks=wanted, limit=limit or None,
                             task_manager=task_manager(False), bootstrap_iters=1000)
    scores = {task: metrics_of(task, output, known, scorer) for task in output["results"]}
    if name in scores or len(scores) == 1:  # prompts are counted over the members of a group
        scores[name if name in scores else next(iter(scores))]["truncated"] = len(scorer.truncated)
    return scores


def metrics_of(task: str, output: dict, known: irt.Known | None, scorer: Scorer) -> dict:
    """Pick the metrics of a task out of what simple_evaluate gave; the scorer keeps its samples."""
    # 'acc,none' is the metric acc through the filter none
    metrics = {key.removesuffix(",none"): value for key, value in output["results"][task].items()
               if isinstance(value, float)}
    samples = [one for one in output["samples"].get(task, ()) if one["filter"] == "none"]
    samples.sort(key=lambda sample: sample["doc_id"])
    kind = output["configs"].get(task, {}).get("output_type")
    if kind == "multiple_choice" and samples:
        metrics["chance"] = sum(1 / len(sample["resps"]) for sample in samples) / len(samples)
        kept = ("doc_id", "target", "arguments", "resps", "acc", "acc_norm")
        scorer.samples[task] = [{key: sample[key] for key in kept if key in sample}
                                for sample in samples]
    metrics["n"] = len(samples) or output["results"][task].get("sample_len")
    if known:
        right, likely = irt.answers(scorer.samples[task], task)
        shots = samples[0]["arguments"][0][0].count("\nAnswer:") - 1
        metrics |= likely | {"shots": shots} | irt.scores(right, known)
    return metrics
