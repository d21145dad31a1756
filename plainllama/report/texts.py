"""Texts: answers that were scored, samples along a run, a dialog and what of it is learned."""

import re
from html import escape
from pathlib import Path

from plainllama.report.blocks import Block, fold, heading, paragraph, short, table_block
from plainllama.report.runs import RunFolder, is_number

STEPS = 8  # of which samples are shown, spread over the run
ROLE = re.compile(r"<\|(system|user|assistant|tool)\|>")  # as plainllama's own template has it


def answers(runs: list[RunFolder], out: Path) -> list[Block]:
    """Show, of each run's newest scores of a file, the worst answers and the best beside prompt and
    reference, and what the libraries say of how they counted."""
    blocks = []
    for run in runs:
        newest = {title: (evaluation.get("step"), metrics) for evaluation in run.evals
                  for title, metrics in evaluation.get("tasks", {}).items()}
        for title, (step, metrics) in newest.items():
            if "examples" not in metrics:
                continue
            blocks += [heading(f"{run.name}, step {step}, {title}", 3), table_block(
                ["row", "score", "prompt", "answer", "reference"],
                [[str(each["row"]), short(each["score"]), each["prompt"], each["answer"],
                  each["reference"]] for each in metrics["examples"]])]
            blocks += [paragraph(f"{name}: {signature}")
                       for name, signature in metrics.get("signatures", {}).items()]
    return blocks


def samples(runs: list[RunFolder], out: Path) -> list[Block]:
    """Show the samples of some steps from the first to the last, the newest on top and open."""
    blocks = []
    for run in runs:
        steps = sorted({row["step"] for row in run.samples if is_number(row.get("step"))})
        shown = steps if len(steps) <= STEPS else [
            steps[round(i * (len(steps) - 1) / (STEPS - 1))] for i in range(STEPS)]
        if shown and len(runs) > 1:
            blocks.append(heading(run.name, 3))
        for step in shown[::-1]:
            texts = [sample(row) for row in run.samples if row.get("step") == step]
            blocks += fold(f"step {step}", texts, opened=step == shown[-1])
    return blocks or [paragraph("No samples yet: sample.py --ckpt RUN --save adds some.")]


def sample(row: dict) -> Block:
    """Show a text that a model wrote behind its prompt; a dialog turn by turn."""
    prompt, completion = str(row.get("prompt", "")), str(row.get("completion", ""))
    text = escape(prompt + completion)
    pieces = ROLE.split(prompt + completion)
    if len(pieces) > 1:
        html = escaped_turns(pieces)
    else:
        html = f"<pre>{escape(prompt).join(('<b>', '</b>')) if prompt else ''}"
        html += f"{escape(completion)}</pre>"
    return Block(html, f"<pre>{text}</pre>")


def escaped_turns(pieces: list[str]) -> str:
    """Lay out a dialog that was cut at its roles: what is in front, then role and text in turn."""
    begin = pieces[0].removeprefix("<s>").strip()
    html = f"<pre>{escape(begin)}</pre>" if begin else ""
    for role, text in zip(pieces[1::2], pieces[2::2], strict=True):
        html += (f'<div class="turn {role}"><span>{role}</span>'
                 f"<pre>{escape(text.replace('<|end|>', '').strip())}</pre></div>")
    return f'<div class="dialog">{html}</div>'


def masks(runs: list[RunFolder], out: Path) -> list[Block]:
    """Show how much of the data is learned, and that in one dialog of the validation split, as
    run.json has it."""
    blocks = []
    for run in runs:
        data, example = run.info.get("data", {}), run.info.get("example")
        learned, tokens = data.get("train_learned"), data.get("train_tokens")
        whose = f"{run.name}: " if len(runs) > 1 else ""
        if is_number(learned) and is_number(tokens) and tokens:
            blocks.append(paragraph(f"{whose}{learned / tokens:.1%} of the {short(tokens)} training"
                                    " tokens are learned, the others are read alone. Marked below:"
                                    " what is learned of the first document of validation."
                                    if example else f"{whose}{learned / tokens:.1%} of the "
                                    f"{short(tokens)} training tokens are learned."))
        if isinstance(example, list) and example:
            html = "".join(f"<mark>{escape(str(text))}</mark>" if is_learned else escape(str(text))
                           for text, is_learned in example)
            text = "".join(f"[[{text}]]" if is_learned else text for text, is_learned in example)
            blocks.append(Block(f'<pre class="mask">{html}</pre>', f"<pre>{escape(text)}</pre>"))
    return blocks
