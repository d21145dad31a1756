"""The model card of an export."""

import json
import shlex
from pathlib import Path

from plainllama.files import read_json, run_of
from plainllama.report.blocks import heading
from plainllama.report.charts import LOSS, charts
from plainllama.report.runs import RunFolder, changes, load
from plainllama.report.scores import baselines, scores
from plainllama.results import read_scores, unplaced
from plainllama.settings import DIALOGS, UserError

# what the card's example asks of a model of either kind
TEXT = 'tokenizer("The", return_tensors="pt")'
DIALOG = """tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello!"}], add_generation_prompt=True, return_dict=True,
    return_tensors="pt")"""

TRANSFORMERS = "from transformers import AutoModelForCausalLM, AutoTokenizer"
PEFT = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
TEMPLATES = {"own": "plainllama's own, chat_template.jinja",
             "model": "the first model's own, chat_template.jinja"}
OBJECTIVES = {"next": "the next token"}
VLLM = """
With vLLM, behind OpenAI's interface:

```sh
{serve}
curl http://localhost:8000/v1/{path} -H 'Content-Type: application/json' \\
  -d '{question}'
```
"""
# plainllama writes the file for both, from the checkpoint, and beside it Ollama's Modelfile
GGUF = """
With llama.cpp, and with Ollama, from a GGUF that plainllama writes of the checkpoint:

```sh
python export.py --ckpt=CHECKPOINT{merge} --to={gguf}
{talk}
```

```sh
ollama create {name} -f {stem}.Modelfile  # which lies beside the GGUF
ollama run {name} "{said}"
```
"""


def card(checkpoint: Path, folder: Path, flags, architecture: dict, counts: tuple[int, int],
         merged: str = "") -> str:
    """Write README.md: what the model is, how it was trained and what it scored, from its run's
    files. `flags`: export.py's; `counts`: all parameters, those without embeddings; `merged`: what
    merging has changed since the run scored it. The curve becomes a picture in `folder`."""
    chat = (folder / "chat_template.jinja").is_file()
    name = flags.push or Path(flags.to).name
    text = Path(__file__).with_name("card.md").read_text("utf-8").format(
        license=flags.license or "not stated", name=name,
        elsewhere=elsewhere(name, folder, flags, chat),
        license_line=f"license: {flags.license}\n" if flags.license else "", dtype=flags.dtype,
        total=counts[0], inner=counts[1], trust=", trust_remote_code=True" if flags.code else "",
        documents="dialogs" if chat else "text", asked=DIALOG if chat else TEXT, skips=not chat,
        imports=PEFT if flags.adapter else TRANSFORMERS,
        library="peft" if flags.adapter else "transformers",
        model=f"Auto{'Peft' if flags.adapter else ''}ModelForCausalLM",
        what="An adapter beside a LLaMA" if flags.adapter else "A LLaMA")
    if merged:
        text += f"\nMerged after training; loss and scores below are from before: {merged}.\n"
    text += section("Architecture", architecture)
    if run := run_of(checkpoint):
        state = read_json(checkpoint / "training" / "state.json")
        text += section("Training", training_facts(read_json(run / "run.json"), state))
        text += curve_and_scores(run, state.get("step", 0), folder)
    return text


def elsewhere(name: str, folder: Path, flags, chat: bool) -> str:
    """Say how vLLM, llama.cpp and Ollama are given the model."""
    if flags.code:
        return ("\nThe folder holds code of its own (`--code`), which vLLM, llama.cpp and Ollama "
                "do not run: exported without it, it is a plain LLaMA, which they open.\n")
    serve, merge = f"vllm serve {name}", ""
    if flags.adapter:
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "BASE"
        # where the base lies on the machine that trained is nobody's business
        serve = f"vllm serve {Path(base).name} --enable-lora --lora-modules {name}={name}"
        merge = " --merge"
    path, key, asked = ("chat/completions", "messages", [{"role": "user", "content": "Hello!"}]) \
        if chat else ("completions", "prompt", "The")
    question = json.dumps({"model": name, key: asked, "max_tokens": 50})
    stem = Path(name).name
    gguf = f"{stem}.gguf"
    talk = f"llama-cli -m {gguf}" if chat else f'llama-completion -m {gguf} -p "The" -n 50'
    return VLLM.format(serve=serve, path=path, question=question) + GGUF.format(
        gguf=gguf, stem=stem, merge=merge, talk=talk, name=stem.lower(),
        said="Hello!" if chat else "The")


def section(title: str, values: dict) -> str:
    """Render a title and a table of the values that are known."""
    rows = [f"| {name} | {value} |\n" for name, value in values.items() if value is not None]
    return f"\n## {title}\n\n| | |\n| --- | --- |\n{''.join(rows)}"


def training_facts(info: dict, state: dict) -> dict:
    """Say how the model was trained, from run.json and state.json; None for what they do not
    say."""
    config, data, device, git = (info.get(name) or {} for name in (
        "config", "data", "device", "git"))
    sources = ", ".join(str(source.get("path")) for source in data.get("sources") or [])
    mixture = config.get("mixture") or {}
    total = sum(mixture.values())
    names = ", ".join(f"{name} ({weight / total:.1%})" for name, weight in mixture.items())
    seen = state.get("rows", 0) * config.get("block_size", 0)  # of a run older than `tokens`
    given = [f"--{name}={value}" for name, value in (info.get("overrides") or {}).items()]
    dialogs = config.get("documents", "text") in DIALOGS
    unit = "learned tokens" if dialogs else "tokens trained on"
    named = info.get("config_file") or "the defaults"
    changed = "; ".join(f"{name} {is_now} (there: {was})"
                        for name, (was, is_now) in changes(info).items()) if config else ""
    edited = " (edited)" if git.get("dirty") else ""
    objective = config.get("objective", "next")
    learned, whole = data.get("train_learned"), data.get("train_tokens")
    share = f", {learned / whole:.1%} of the tokens" if learned and whole else ""
    # what of its documents reached the model, and how they lay in its context
    recipe = ", ".join(f"{name}={config[name]}" for name in (
        "packing", "doc_mask", "block_size", "dedup", "min_chars", "max_chars")
        if config.get(name) not in (None, 0, "none"))
    return {
        "data set": names or data.get("name"), "validated on": data.get("name") if names else None,
        "sources": None if names else sources or None,  # they are of the one that validates
        "documents": config.get("documents"), "data recipe": recipe or None,
        "training split": f"{whole:,} tokens" if whole and not names else None,
        "learned": f"{config.get('train_on')}{share}" if dialogs else None,
        "chat template": TEMPLATES.get(config.get("chat_template", "")) if dialogs else None,
        "started from": config.get("init_from") or None,
        "tokenizer": tokenizer_of(data), "data's sha256": data.get("manifest_sha256"),
        "objective": ", ".join([OBJECTIVES.get(objective, objective), *(
            f"{name} {config[name]}" for name in ("preference_beta", "nll_weight", "lora_r")
            if config.get(name) and (name != "preference_beta" or objective != "next"))]),
        "steps": state.get("step", 0),
        unit: f"{state.get('tokens', seen):,}",
        "device": f"{device.get('count')} x {device.get('name')}" if device else None,
        "commit": f"{git.get('commit')}{edited}" if git else None,
        f"changed of {named}": changed or None,
        "command": shlex.join(["python", "train.py", info.get("config_file") or "", *given])}


def tokenizer_of(data: dict) -> str | None:
    """Name the tokenizer of a run's data set."""
    found = data.get("tokenizer")
    if not isinstance(found, dict):
        return found
    size = f", {found['vocab_size']:,} entries" if found.get("vocab_size") else ""
    return f"{found.get('spec')}{size}, sha256 {found.get('sha256')}"


def curve_and_scores(run: Path, step: int, folder: Path) -> str:
    """Render the curve up to the step that is exported, a picture in `folder`, and its scores."""
    blocks, scored = [], unplaced(read_scores(run, step), run)
    try:
        history = load(run)
        history.metrics = [row for row in history.metrics if row["step"] <= step]
        blocks = charts([[history]], folder / "curve.html", LOSS)
    except UserError as error:
        print(f"no curve in the model card: {error}")
    if scored:
        runs = [RunFolder(run.name, {}, [], {}, [], [scored])]
        blocks += [heading("Scores", 2), *scores(runs), *baselines(runs)]
    return "".join(f"\n{block.markdown}\n" for block in blocks)
