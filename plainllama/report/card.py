"""The model card of an export."""

import shlex
from pathlib import Path

from model import LLaMA
from plainllama.files import read_json, run_of
from plainllama.report.charts import CHARTS, charts
from plainllama.report.page import baselines, scores
from plainllama.report.runs import RunFolder, load
from plainllama.settings import UserError

CARD = """---
{license_line}library_name: transformers
pipeline_tag: text-generation
tags: [llama, plainllama]
---
# {name}

A LLaMA of {total:,} parameters ({inner:,} without embeddings), trained from text by plainllama, a
LLaMA trainer in plain PyTorch. The weights are {dtype}. Licence: {license}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
ids = model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=50)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```
"""


def card(model: LLaMA, folder: Path, flags, to: Path) -> str:
    """README.md: what the model is, how it was trained and what it scored, from its run's files.
    The curve goes into the folder `to`."""
    total, inner = model.parameter_counts()
    run, state = run_of(folder), read_json(folder / "training" / "state.json")
    info = read_json(run / "run.json") if run else {}
    step, config, data = state.get("step", 0), info.get("config") or {}, info.get("data") or {}
    device, git = info.get("device") or {}, info.get("git") or {}
    words = [f"--{name}={value}" for name, value in (info.get("overrides") or {}).items()]
    sources = [source["path"] for source in data.get("sources") or []]
    tokens = state.get("rows", 0) * config.get("block_size", 0)
    facts = {
        "data set": data.get("name"), "sources": ", ".join(sources) or None,
        "tokenizer": data.get("tokenizer"), "data's sha256": data.get("manifest_sha256"),
        "steps": step, "tokens trained on": f"{tokens:,}",
        "device": f"{device.get('count')} x {device.get('name')}" if device else None,
        "commit": f"{git['commit']}{' (edited)' * bool(git.get('dirty'))}" if git else None,
        "command": shlex.join(["python", "train.py", info.get("config_file") or "", *words])}
    text = CARD.format(license=flags.license or "not stated", total=total, inner=inner,
                       license_line=f"license: {flags.license}\n" * bool(flags.license),
                       name=flags.push or Path(flags.to).name, dtype=flags.dtype,
                       trust=", trust_remote_code=True" * flags.code)
    for title, table in (("Architecture", vars(model.config)), ("Training", facts if info else {})):
        lines = [f"| {name} | {value} |" for name, value in table.items() if value is not None]
        text += "\n".join([f"\n## {title}\n\n| | |\n| --- | --- |", *lines, ""]) if lines else ""
    return text + (measured_card(run, step, to) if run else "")


def measured_card(run: Path, step: int, to: Path) -> str:
    """The card's curve, a picture in `to`, and the scores of the step that is exported."""
    found, text = read_json(run / "eval" / f"step_{step}.json"), ""
    try:
        whole = load(run)
        whole.metrics = [row for row in whole.metrics if row["step"] <= step]
        blocks = charts([[whole]], to / "curve.html", CHARTS[:1])
        text += "".join(f"\n{picture}\n" for _, picture in blocks)
    except UserError as error:
        print(f"no curve in the model card: {error}")
    if found:
        one = [RunFolder(run.name, {}, [], {}, [], [found])]
        text += "\n## Scores\n" + "".join(f"\n{block}\n" for _, block in
                                         [*scores(one), *baselines(one)])
    return text
