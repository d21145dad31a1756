"""Run folders -> one page with curves, samples and scores, and the same in Markdown.

  report.py                      the newest run under out/
  report.py out/RUN              writes out/RUN/report.html, and report.md with report_*.svg
  report.py out/A out/B out/C    one page for several, in the first one's folder; runs that differ
                                 only in their seed are drawn as their mean and a band around it,
                                 from the lowest to the highest
  report.py out/RUN --compare=reference/quickstart.json
                                 how many sigmas its losses are from those of the same recipe
                                 (made by report.py out/A out/B out/C --save_reference=FILE)

The page needs nothing but itself: no scripts, no network. Its figures are embedded as data too:
<script type="application/json" id="data"> holds {"runs": [{"name", "info", "metrics", ...}]}, of
which `metrics` are the rows of metrics.jsonl and `info` is run.json.
"""

import itertools
import json
from dataclasses import dataclass
from html import escape
from pathlib import Path

from plainllama.command import parse_arguments, run_command
from plainllama.report import compare
from plainllama.report.charts import STYLE
from plainllama.report.page import PAGE, page
from plainllama.report.runs import find_run, load
from plainllama.settings import UserError, key


@dataclass
class Flags:
    """What report.py takes besides run folders."""

    out: str = key("", "the page to write (default: report.html in the first run's folder)")
    compare: str = key("", "no page: how far a run is from this file of reference curves")
    save_reference: str = key("", "no page: make this file of the curves of runs, a seed each")


# ---- reading


# ---- curves


# ---- the page as blocks, each of them (HTML, Markdown)


def main(command) -> int:
    """Read the runs, write the page and its Markdown twin; or compare with reference curves."""
    folders = list(dict.fromkeys(map(find_run, command.files or ["out"])))
    flags = command.flags
    if flags.compare or flags.save_reference:
        if sum(map(bool, (flags.compare, flags.save_reference, flags.out))) > 1:
            raise UserError("--compare, --save_reference and --out exclude each other")
        runs = [load(folder) for folder in folders]
        print(compare.save(runs, Path(flags.save_reference)) if flags.save_reference else
              "\n".join(itertools.chain.from_iterable(
                  compare.compare(run, Path(flags.compare)) for run in runs)))
        return 0
    out = Path(flags.out or folders[0] / "report.html")
    if out.suffix != ".html":
        raise UserError(f"--out={out} must end in .html; the Markdown goes beside it")
    runs = [load(folder) for folder in folders]
    out.parent.mkdir(parents=True, exist_ok=True)
    html, markdown = zip(*page(runs, out), strict=True)
    # without a < nothing in the data can end the element that holds it
    data = json.dumps({"runs": [vars(run) for run in runs]}).replace("<", "\\u003c")
    title = escape(", ".join(run.name for run in runs))
    out.write_text(PAGE.format(title=title, style=STYLE, body="\n".join(html), data=data),
                   "utf-8", "replace")
    beside = out.with_suffix(".md")
    beside.write_text("\n\n".join(markdown) + "\n", "utf-8", "replace")
    print(f"{len(runs)} run(s) -> {out} and {beside}")
    return 0


if __name__ == "__main__":
    run_command(main, parse_arguments(__doc__, Flags, takes="files"))
