"""The page: everything that is said of runs, panel by panel."""

import hashlib
import json
import re
import shlex
from base64 import b64encode
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from string import Template

from plainllama.files import write_text
from plainllama.report.blocks import (
    Block,
    as_markdown,
    as_said,
    fold,
    heading,
    paragraph,
    plain,
    side_by_side,
)
from plainllama.report.charts import LEARNED, LOSS, MACHINE, charts, trade_offs
from plainllama.report.drawing import STYLE
from plainllama.report.runs import RunFolder, changes, grouped, is_number, parent_of
from plainllama.report.scores import baselines, folds, growth, scores
from plainllama.report.texts import answers, masks, samples
from plainllama.report.verdict import figures, kind_of, outcome, verdict
from plainllama.settings import UserError

PARTS = {name: Path(__file__).with_name(name).read_text("utf-8")
         for name in ("page.html", "page.css", "page.js")}


def write_page(runs: list[RunFolder], out: Path, every: int = 0) -> Path:
    """Write the page, its pictures and its Markdown twin, whose path is returned; with `every` the
    page loads itself anew after so many seconds. UserError if something else than an older page of
    these runs, or of this run before it was moved, is in its place."""
    twin, there = out.with_suffix(".md"), runs_of(out)
    named = [run.name for run in runs]
    place = out.resolve()  # of a run's own page, also where the run has another name by now
    own = len(there) == 1 and [*place.parts[-3:]] == [*"/".join(named).split("/"), "report.html"]
    if there != named and not own and (out.exists() or twin.exists()):
        what = f"is the page of {', '.join(there)}" if there else f"or {twin} is there already"
        raise UserError(f"{out} {what}; name another with --out=FILE.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    title = ", ".join(run.name for run in runs)
    blocks = [heading(title, 1), *head(runs)]
    for name, panel in PANELS.items():
        if content := panel(runs, out):
            blocks += folded(name, content) if name in FOLDED else [heading(name, 2), *content]
    data = {"every": every, "charts": [block.chart for block in blocks if block.chart],
            "runs": [vars(run) for run in runs]}
    script = PARTS["page.js"]
    html = Template(PARTS["page.html"]).substitute(
        title=escape(title), style=STYLE + PARTS["page.css"], data=as_data(data), script=script,
        script_hash=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        refresh=f'<noscript><meta http-equiv="refresh" content="{every}"></noscript>'
        if every else "", body="\n".join(block.html for block in blocks))
    text = "\n\n".join(block.markdown for block in blocks if block.markdown)
    write_text(twin, plain(text) + "\n")
    write_text(out, plain(html))
    return twin


def as_data(value) -> str:
    """Write JSON for the inside of an element of HTML. Without a < nothing in it can end the
    element; half a surrogate pair, which UTF-8 cannot hold, is spelt."""
    text = as_said(value).replace("<", "\\u003c")
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def runs_of(page: Path) -> list[str]:
    """Read the names of its runs off a page; [] if it is no page of ours."""
    text = page.read_text("utf-8", "replace") if page.exists() else ""
    data = re.search('id="data">(.*?)</script>', text)
    return [run["name"] for run in json.loads(data[1])["runs"]] if data else []


def head(runs: list[RunFolder]) -> list[Block]:
    """Say what came of the runs: of one at length; of several in what they differ, and then their
    figures beside each other."""
    if len(runs) == 1:
        return verdict(runs[0])
    names, differ = [run.name for run in runs], between(runs)
    return [heading("What differs between these runs", 2),
            side_by_side(names, differ) if any(differ) else paragraph("Nothing of their configs."),
            heading("What came of them", 2), side_by_side(names, [*map(figures, runs)]),
            *fold("In sentences", [paragraph(outcome(run)) for run in runs])]


def between(runs: list[RunFolder]) -> list[dict]:
    """Give of each run's config the keys in which the runs differ."""
    configs = [run.info["config"] for run in runs]
    known = dict.fromkeys(name for config in configs for name in config)
    names = [name for name in known if name not in ("out_dir", "resume")
             and any(config.get(name) != configs[0].get(name) for config in configs)]
    return [{name: config.get(name) for name in names} for config in configs]


def folded(title: str, content: list[Block]) -> list[Block]:
    """Lay a panel behind its title."""
    name = heading(title, 2)
    return [Block(f'<details class="panel"><summary>{name.html}</summary>', name.markdown),
            *content, Block("</details>", "")]


# ---- what was run

def differences(runs: list[RunFolder], out: Path) -> list[Block]:
    """Show by which commands the runs were started, what each command changed of its config file,
    and folded, apart from that, what the files themselves set: every other key that differs from
    the first one's parent config."""
    blocks: list[Block] = []
    changed: set[str] = set()
    for run in runs:
        blocks.append(shell(command_line(run)))
        if found := changes(run.info):
            changed |= found.keys()
            blocks.append(side_by_side(
                [str(run.info.get("config_file") or "defaults"),
                 run.name if len(runs) > 1 else "this run"],
                [{name: pair[i] for name, pair in found.items()} for i in (0, 1)]))
    parent, base = parent_of(runs[0].info)
    configs = [parent, *(run.info["config"] for run in runs)]
    names = [name for name in runs[0].info["config"] if name not in changed | {"out_dir"}
             and any(values.get(name) != parent.get(name) for values in configs)]
    return blocks + fold(
        f"{len(names)} other keys differ from the parent, {base}",
        [side_by_side(["parent", *(run.name for run in runs)],
                      [{name: values.get(name) for name in names} for values in configs])])


def shell(command: str) -> Block:
    """Show a command, which breaks at no hyphen."""
    return Block(f"<pre>{escape(command)}</pre>", as_markdown(command))


def command_line(run: RunFolder) -> str:
    """Say by which command a run was last started."""
    config_file, ranks = run.info.get("config_file", ""), run.info["device"].get("count", 1)
    keys = {"out_dir": run.info["config"].get("out_dir"), **run.info.get("overrides", {})}
    if keys["out_dir"] in (None, f"out/{Path(config_file).stem}"):
        del keys["out_dir"]
    options = [f"--{name}={value if isinstance(value, str) else as_said(value)}"
               for name, value in keys.items()]
    said = f"{run.name} was last started by: train.py {shlex.join([config_file, *options])}"
    return f"{said} on {ranks} ranks of torchrun" if ranks > 1 else said


# ---- environment

def environment(runs: list[RunFolder], out: Path) -> list[Block]:
    """Show on what data, by which program and on which device the runs were made."""
    names = ("config_file", "started", "data", "device", "git", "versions")
    columns = []
    for run in runs:
        columns.append({name: run.info[name] for name in names if name in run.info})
        if is_number(run.info.get("started")):
            started = datetime.fromtimestamp(run.info["started"], UTC)
            columns[-1]["started"] = f"{started:%Y-%m-%d %H:%M UTC}"
        if mixture := run.info["config"].get("mixture"):  # data is then what validates
            columns[-1]["mixture"] = mixture
    return [side_by_side([run.name for run in runs], columns)]


def curves(runs: list[RunFolder], out: Path) -> list[Block]:
    """Draw the loss, and small beside each other what else is learned."""
    groups = grouped(runs)
    kinds = {kind_of(run) == "preference" for run in runs}
    unit = "token or pair" if len(kinds) > 1 else "pair" if True in kinds else "token"
    loss = tuple(chart._replace(title=f"Loss, nats per {unit}") for chart in LOSS)
    return [CONTROLS, *charts(groups, out, loss),
            *grid([*charts(groups, out, LEARNED), *trade_offs(groups, out)])]


def grid(blocks: list[Block]) -> list[Block]:
    """Lay charts beside each other, as many as there is room for."""
    return [Block('<div class="grid">', ""), *blocks, Block("</div>", "")] if blocks else []


def scored(runs: list[RunFolder], out: Path) -> list[Block]:
    """Show all scores."""
    return [*grid(growth(runs, out)), *baselines(runs), *scores(runs), *folds(runs)]


def machine(runs: list[RunFolder], out: Path) -> list[Block]:
    """Draw the course of the optimizer and of the machine."""
    return grid(charts(grouped(runs), out, MACHINE))


# of all charts; page.js shows it, as it does nothing without a script
CONTROLS = Block("""<form id="controls" hidden>
<fieldset><legend>x</legend><label><input type="radio" name="x" value="step" checked>steps</label>
<label><input type="radio" name="x" value="tokens">tokens</label>
<label><input type="radio" name="x" value="hours">hours</label></fieldset>
<label>smoothing
<input type="range" name="smooth" min="0" max="0.1" step="0.005" value="0.02"></label>
<label><input type="checkbox" name="log">log y</label>
<label><input type="checkbox" name="whole">with the first steps</label>
<small>drag: zoom; double click: back</small></form>""", "")
# what the page shows, in order: title -> function of the runs and the page's path, in whose folder
# pictures are written. A panel without blocks is left out. To add one: an entry here, its function,
# a test.
PANELS = {
    "Curves": curves,
    "Scores": scored,
    "Answers": answers,
    "Samples": samples,
    "What was run": differences,
    "Optimizer and machine": machine,
    "What is learned of a dialog": masks,
    "Data, tokenizer and environment": environment,
}
FOLDED = ("Optimizer and machine", "What is learned of a dialog", "Data, tokenizer and environment")
