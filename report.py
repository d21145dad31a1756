"""Run folders -> one page with curves, samples and scores, and the same in Markdown.

  report.py                      the newest run under out/
  report.py out/RUN              writes out/RUN/report.html, and report.md with report_*.svg
  report.py out/RUN --watch      writes it again as the run goes on, and ends when the run ends; the
                                 open page loads itself anew and keeps its reader's place
  report.py out/A out/B out/C    one page for several, out/A/report_with_B_C.html, out/* for all
                                 runs of a folder; what is no run is left out; runs that differ
                                 only in their seed are drawn as their mean and a band around it,
                                 from the lowest to the highest
  report.py out/RUN --compare=reference/quickstart.json
                                 how many sigmas its losses are from those of the same recipe
                                 (made by report.py out/A out/B out/C --save_reference=FILE)

The page is one file and asks for nothing: no network, and a script of its own alone, which shows
values under the pointer, zooms, and draws against tokens or hours; without it the page is whole.
Its figures are embedded as data too: <script type="application/json" id="data"> holds
{"runs": [{"name", "info", "metrics", ...}], "charts": [...]}, of which `metrics` are the rows of
metrics.jsonl and `info` is run.json.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from plainllama.command import CommandLine, parse_arguments, run_command
from plainllama.files import read_status
from plainllama.report import compare
from plainllama.report.page import write_page
from plainllama.report.runs import find_runs, load, silent, started
from plainllama.settings import UserError, key


@dataclass
class Flags:
    """What report.py takes besides run folders."""

    ckpt: str = key("", "a run, as one that stands without a name")
    out: str = key("", "the page to write (default: in the first run's folder)")
    watch: bool = key(False, "write the page again and again until the runs end")
    every: int = key(10, "seconds between two pages of --watch", low=1)
    compare: str = key("", "no page: how far a run is from this file of reference curves")
    save_reference: str = key("", "no page: make this file of the curves of runs, a seed each")


def main(command: CommandLine) -> int:
    """Write the page and its Markdown twin; or compare the runs with reference curves."""
    flags = command.flags
    folders = find_runs(command.files + ([flags.ckpt] if flags.ckpt else []) or ["out"])
    if len([name for name in ("out", "compare", "save_reference") if getattr(flags, name)]) > 1:
        raise UserError("--compare, --save_reference and --out exclude each other")
    if flags.watch and (flags.compare or flags.save_reference):
        raise UserError("--watch writes pages; leave out --compare and --save_reference")
    if "every" in command.overrides and not flags.watch:
        raise UserError("--every has no effect without --watch")
    others = "_".join(folder.name for folder in folders[1:])[:100]
    name = f"report_with_{others}.html" if others else "report.html"
    out = Path(flags.out or folders[0] / name)
    if out.suffix != ".html":
        raise UserError(f"--out={out} must end in .html; the Markdown goes beside it")
    own = [folder / "report.html" for folder in folders]
    if len(folders) > 1 and out.resolve() in [page.resolve() for page in own]:
        raise UserError(f"--out={out} is the page of that run alone; name another for the "
                        f"comparison: --out={out.with_name(name)}")
    if flags.watch:
        return watch(folders, out, flags.every)
    runs = [load(folder) for folder in folders]
    if flags.save_reference:
        print(compare.save(runs, Path(flags.save_reference)))
    elif flags.compare:
        print("\n".join(compare.compare(run, Path(flags.compare)) for run in runs))
    else:
        print(f"{len(runs)} run(s) -> {out} and {write_page(runs, out)}")
    return 0


def watch(folders: list[Path], out: Path, every: int) -> int:
    """Write the page every few seconds until no run goes on: each is done, stopped or failed, or
    has not written for so long that it must have been killed; the exit code."""
    while not all(map(started, folders)):
        print("waiting for the first rows of metrics.jsonl", flush=True)
        time.sleep(every)
    said = False
    while True:
        # first the states, so that what a run wrote before it ended is on the last page
        at_work = [folder for folder in folders if read_status(folder) == "running"]
        gone = [folder for folder in at_work if silent(folder)]
        go_on = len(at_work) > len(gone)
        write_page([load(folder) for folder in folders], out, every if go_on else 0)
        if not go_on:
            break
        if not said:
            print(f"{out}, anew every {every} s; Ctrl-C ends this and not the run", flush=True)
        said = True
        time.sleep(every)
    for folder in gone:
        print(f"{folder} has not written for long; it may have been killed")
    print(f"{len(folders)} run(s) -> {out}: the last page, nothing goes on")
    return 0


if __name__ == "__main__":
    run_command(main, parse_arguments(__doc__, Flags, takes="files"))
