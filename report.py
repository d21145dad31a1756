"""Run folders -> one page with curves, samples and scores, and the same in Markdown.

  report.py                      the newest run under out/
  report.py out/RUN              writes out/RUN/report.html, and report.md with report_*.svg
  report.py out/A out/B out/C    one page for several, out/A/report_with_B_C.html; runs that differ
                                 only in their seed are drawn as their mean and a band around it,
                                 from the lowest to the highest
  report.py out/RUN --compare=reference/quickstart.json
                                 how many sigmas its losses are from those of the same recipe
                                 (made by report.py out/A out/B out/C --save_reference=FILE)

The page needs nothing but itself: no scripts, no network. Its figures are embedded as data too:
<script type="application/json" id="data"> holds {"runs": [{"name", "info", "metrics", ...}]}, of
which `metrics` are the rows of metrics.jsonl and `info` is run.json.
"""

from dataclasses import dataclass
from pathlib import Path

from plainllama.command import CommandLine, parse_arguments, run_command
from plainllama.report import compare
from plainllama.report.page import write_page
from plainllama.report.runs import find_run, load
from plainllama.settings import UserError, key


@dataclass
class Flags:
    """What report.py takes besides run folders."""

    out: str = key("", "the page to write (default: in the first run's folder)")
    compare: str = key("", "no page: how far a run is from this file of reference curves")
    save_reference: str = key("", "no page: make this file of the curves of runs, a seed each")


def main(command: CommandLine) -> int:
    """Write the page and its Markdown twin; or compare the runs with reference curves."""
    folders = list(dict.fromkeys(map(find_run, command.files or ["out"])))
    flags = command.flags
    if len(list(filter(None, vars(flags).values()))) > 1:
        raise UserError("--compare, --save_reference and --out exclude each other")
    others = "_".join(folder.name for folder in folders[1:])[:100]
    name = f"report_with_{others}.html" if others else "report.html"
    out = Path(flags.out or folders[0] / name)
    if out.suffix != ".html":
        raise UserError(f"--out={out} must end in .html; the Markdown goes beside it")
    runs = [load(folder) for folder in folders]
    if flags.save_reference:
        print(compare.save(runs, Path(flags.save_reference)))
    elif flags.compare:
        print("\n".join(compare.compare(run, Path(flags.compare)) for run in runs))
    else:
        print(f"{len(runs)} run(s) -> {out} and {write_page(runs, out)}")
    return 0


if __name__ == "__main__":
    run_command(main, parse_arguments(__doc__, Flags, takes="files"))
