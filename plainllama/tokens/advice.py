"""What prepare.py says of a set: its counts, that it is small for its config, what suits better."""

import contextlib
import os
import time
from dataclasses import replace

from plainllama.command import read_config
from plainllama.files import CHECKOUT
from plainllama.settings import Settings, UserError
from plainllama.text.selection import NEARLY

FEW = 20  # windows of validation: fewer make its loss a matter of luck
OFTEN, SELDOM = 10, 0.5  # passes over the text beyond which another run is suggested
REPEATED = 4  # passes that are worth nearly as much as new text (https://arxiv.org/abs/2305.16264)
ENOUGH = 1_000_000_000  # tokens of a run, up to which a text is read so often
# what is suggested, and from how many tokens of text on; docs/text.md has the table
CONFIGS = {"config/quickstart.py": 0, "config/laptop.py": 6_000_000,
           "config/llama100m.py": 100_000_000}
SHAPE = {"n_layer", "n_head", "n_kv_head", "d_model", "d_ff", "block_size", "global_batch_tokens"}
LEAST = 100  # steps of a run that is worth suggesting
SECONDS = 1.5  # of measuring
LAYERS, CONTEXT, PASS = 2, 256, 5e9  # of what is measured; PASS: parameters times tokens on a CPU
LARGEST = 200_000_000  # parameters of a model that is tried
ENDED = {  # where our own runs of a config's shape did
    "config/quickstart.py": "1.43 bits per byte after 2.05 M tokens of Python code (the demo); of "
                            "English 1.89 after 10 M tokens (10 MB), 2.13 after 1.2 M (1 MB)",
    "config/llama100m_ctx256.py": "1.29 bits per byte after 77 M tokens of English"}


def print_counts(manifest: dict) -> None:
    """Print what came in, what was dropped by which rule, and what there is."""
    dropped, splits = manifest["dropped"], manifest["splits"]
    total = sum(x.get("documents", x.get("count")) for x in (*splits.values(), *dropped.values()))
    kind = manifest["recipe"].get("documents")
    what = {"preference": "pairs", "table": "clients"}.get(kind, "documents")
    print(f"{total:>14,} {what} in")
    for why in ("dropped", "cut"):
        for rule, entry in manifest.get(why, {}).items():
            kind = "dropped: " if rule.startswith("a ") else f"{why}: "
            print(f"{entry['count']:>14,} {'' if rule.startswith('note: ') else kind}{rule} "
                  f"(first: {entry['first']})")
    unit, rate = ("learned", "learned") if "by_source" in manifest else ("bytes", "bytes/token")
    print(f"{'':8}{what:>12}{'tokens':>16}{'MB':>10}{rate:>13}{'longest':>11}")
    for split, n in splits.items():
        print(f"{split:8}{n['documents']:>12,}{n['tokens']:>16,}{n['bytes'] / 1e6:>10,.1f}"
              f"{n.get(unit, 0) / max(n['tokens'], 1):>13.3f}{n['longest']:>11,}")
    share = splits["val"]["bytes"] / max(1, sum(n["bytes"] for n in splits.values()))
    asked = manifest["recipe"].get("val_fraction", share)
    if abs(share - asked) > NEARLY * asked:
        print(f"note: validation is {100 * share:.3g} % of the text, {100 * asked:.3g} % was asked "
              "(val_fraction): documents are held out whole")


def windows_of(tokens: int, block_size: int) -> int:
    """Count the windows of a text: T + 1 tokens make one, and they share their last one."""
    return max(tokens - 1, 0) // block_size


def passes_of(config: Settings, splits: dict) -> float:
    """Say how often a run of this config would read the training split, 0 if it names epochs or
    does not read one text alone."""
    if config.epochs or config.mixture or config.overfit_rows:
        return 0.0
    tokens = windows_of(splits["train"]["tokens"], config.block_size) * config.block_size
    return config.max_steps * config.global_batch_tokens / tokens if tokens else 0.0


def small(config: Settings, splits: dict) -> str:
    """Say of a text what there is of each split, and the remedy, if that is little for its config;
    else ''."""
    windows = {split: windows_of(n["tokens"], config.block_size) for split, n in splits.items()}
    step = config.global_batch_tokens // config.block_size
    if config.documents != "text" or (windows["val"] >= FEW and windows["train"] >= step):
        return ""
    counted = "; ".join(f"{split} {n['documents']:,} documents, {n['tokens']:,} tokens, "
                        f"{windows[split]:,} windows of block_size {config.block_size}"
                        for split, n in splits.items())
    said = [f"note: little text: {counted}"]
    if windows["train"] < step:
        said.append(f"a step takes {step:,} rows: more text, or a smaller --global_batch_tokens")
    if windows["val"] < FEW:
        said.append(f"validation of fewer than {FEW} windows says little: more text, a larger "
                    "--val_fraction or a smaller --block_size")
    return "; ".join(said)


def foreseen(config: Settings, given: dict, splits: dict) -> bool:
    """Whether the command line names a text, and the config a run of it alone from nothing, whose
    steps are known."""
    other = config.documents != "text" or config.init_from or config.max_minutes
    return "sources" in given and not other and passes_of(config, splits) > 0


def suited(config: Settings, named: str, given: dict, splits: dict) -> tuple[str, dict]:
    """Choose the config file, and what is changed of it, of a run that suits a text, where the one
    that is `named` would read it more than OFTEN or less than SELDOM times; ("", {}) where that is
    not so, or the text is not one that the command line names. Keys that are `given` there stay,
    and the file too if some of its SHAPE are."""
    fits = SELDOM <= passes_of(config, splits) <= OFTEN
    if fits or "max_steps" in given or not foreseen(config, given, splits):
        return "", {}
    tokens = splits["train"]["tokens"]
    path = CHECKOUT / [path for path, least in CONFIGS.items() if tokens >= least][-1]
    stays = SHAPE & set(given) or os.path.realpath(named) == os.path.realpath(path)
    file = named if stays else os.path.relpath(path)
    run = run_of(file, given)
    steps = round(max(tokens, min(REPEATED * tokens, ENOUGH)) / run.global_batch_tokens)
    if steps < LEAST:
        return "", {}  # no run is short enough for so little text: small() has said so
    keys = {"max_steps": steps, "warmup_steps": min(run.warmup_steps, steps // 10)}
    return file, {name: value for name, value in keys.items()
                  if name not in given and value != getattr(run, name)}


def run_of(file: str, keys: dict) -> Settings:
    """Give the config of a file with some keys of a command line."""
    values = vars(Settings())
    for _, layer in read_config(file):
        values |= layer
    return Settings(**values | keys)


def outlook(config: Settings, named: str, given: dict, file: str, better: dict, splits: dict,
            vocab_size: int) -> list[str]:
    """Say in lines what to expect of a run on a text of the command line: size, context, length,
    time on this machine, which is measured if it can be, and what runs of that shape have reached.
    It is the run of the config that is `named`, or of `file` and its `better` keys of suited(). []
    if the length is not known."""
    if not foreseen(config, given, splits):
        return []
    run = run_of(file, given | better) if file else config
    lines = [f"{'suggested' if file else 'this run'}: {os.path.basename(file or named)}, "
             f"{run.n_layer} layers of {run.d_model}, context {run.block_size}, "
             f"{run.max_steps:,} steps of {run.global_batch_tokens:,} tokens, "
             f"{passes_of(run, splits):.1f} times the text"]
    with contextlib.suppress(UserError, RuntimeError):  # no such device here, or too little memory
        speed, device = tokens_per_second(run, vocab_size)
        seconds = run.max_steps * run.global_batch_tokens / speed
        hours = f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.0f} hours"
        lines[0] += (f": about {hours} here (one {device}, {speed:,.0f} tokens/s, eager, measured "
                     "for a moment)")
    if file or passes_of(config, splits) > OFTEN:
        lines.insert(0, f"note: {config.max_steps:,} steps of {config.global_batch_tokens:,} "
                     f"tokens would read this text {passes_of(config, splits):,.1f} times" + (
                         "" if file else "; take more text, or fewer --max_steps"))
    for path, reached in ENDED.items():
        same = run_of(str(CHECKOUT / path), {})
        if all(getattr(run, key) == getattr(same, key) for key in SHAPE) and (
                config.tokenizer == same.tokenizer):
            lines.append(f"for comparison, validation of our runs: {reached}")
    return lines


def tokens_per_second(run: Settings, vocab_size: int) -> tuple[float, str]:
    """Measure for SECONDS how many tokens a second go through a run's model forwards and backwards
    on this machine, without the optimizer: some layers of it on a short context, and the rest
    reckoned by its operations. Also on which device."""
    import torch

    from model import LLaMA, ModelConfig, flops_per_token
    from plainllama.parallel import pick_device, pick_dtype

    device = torch.device(pick_device(run.device))
    whole = ModelConfig(run.n_layer, run.n_head, run.d_model, run.d_ff, vocab_size, run.block_size,
                        run.n_kv_head)
    part = replace(whole, n_layer=min(run.n_layer, LAYERS), block_size=min(run.block_size, CONTEXT))
    share = flops_per_token(part, part.block_size) / flops_per_token(whole, whole.block_size)
    with torch.device("meta"):
        number = sum(parameter.numel() for parameter in LLaMA(part).parameters())
    if number > LARGEST:
        raise UserError(f"{number:,} parameters are not tried")
    with device:
        model = LLaMA(part)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        rows = max(1, int(PASS / (part.block_size * number))) if device.type == "cpu" else 32
        rows = min(rows, run.global_batch_tokens // part.block_size)
        ids = torch.randint(vocab_size, (rows, part.block_size))
    began, turns, warm = time.perf_counter(), 0, False
    while not turns or time.perf_counter() - began < SECONDS:
        with torch.autocast(device.type, pick_dtype("auto", device), device.type == "cuda"):
            model(ids, ids).backward()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        turns += 1
        if not warm and time.perf_counter() - began < SECONDS:  # a quick first one is not counted
            began, turns, warm = time.perf_counter(), 0, True
    return share * turns * ids.numel() / (time.perf_counter() - began), device.type
