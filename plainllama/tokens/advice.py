"""What prepare.py says of a set: its counts, that it is small for its config, what suits better."""

import time
from typing import Any

from plainllama.settings import Settings
from plainllama.text.selection import NEARLY

FEW = 20  # windows of validation: fewer make its loss a matter of luck
OFTEN, SELDOM = 10, 0.5  # passes over the text beyond which another run is suggested
REPEATED = 4  # passes that are worth nearly as much as new text (https://arxiv.org/abs/2305.16264)
ENOUGH = 100_000_000  # tokens up to which a text is read so often
PER_PARAMETER = 20  # tokens (https://arxiv.org/abs/2203.15556)
# what is suggested, from the quickstart's shape to llama100m's
SHAPES = tuple(dict(zip(("n_layer", "n_head", "d_model", "d_ff", "block_size",
                         "global_batch_tokens"), shape, strict=True)) for shape in (
    (2, 6, 192, 512, 256, 2048), (4, 4, 256, 688, 256, 8192), (8, 6, 384, 1024, 512, 16384),
    (12, 8, 512, 1376, 1024, 65536), (16, 12, 768, 2048, 1024, 524288)))
LEAST = 100  # steps of a run that is worth suggesting
SECONDS = 1.5  # of measuring
ENDED = ("the quickstart, of this size, ends at 1.43 bits per byte on Python code after 2.05 M "
         "tokens")


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


def suited(config: Settings, given: Any, splits: dict) -> dict:
    """Choose the keys of a run that suits a text, where this config's would read it more than OFTEN
    or less than SELDOM times; {} where that is not so, or the text is not one that the command line
    names. Keys that are `given` there stay."""
    passes = passes_of(config, splits)
    other = (config.documents != "text" or config.init_from or config.max_minutes
             or "max_steps" in given)
    if other or "sources" not in given or not passes or SELDOM <= passes <= OFTEN:
        return {}
    tokens = splits["train"]["tokens"]
    seen = max(tokens, min(REPEATED * tokens, ENOUGH))
    shape = [shape for shape in SHAPES if PER_PARAMETER * parameters(shape) <= seen or
             shape is SHAPES[0]][-1]
    if not {"n_head", "d_model", "block_size", "global_batch_tokens", "n_kv_head"} & set(given):
        keys = {**shape, "n_kv_head": 0}
    else:
        keys = {}  # parts of a shape may not go together with what is given
    batch = keys.get("global_batch_tokens", config.global_batch_tokens)
    steps = round(seen / batch)
    if steps < LEAST:
        return {}  # no run is short enough for so little text: small() has said so
    keys |= {"max_steps": steps, "warmup_steps": min(config.warmup_steps, steps // 10)}
    return {name: value for name, value in keys.items()
            if name not in given and value != getattr(config, name)}


def parameters(shape: dict) -> int:
    """Count a shape's parameters, without embeddings and gains."""
    width = shape["d_model"]
    return shape["n_layer"] * (4 * width ** 2 + 3 * width * shape["d_ff"])


def suggestion(config: Settings, keys: dict, splits: dict, vocab_size: int) -> list[str]:
    """Say in lines what `keys` of suited() are worth: how often this config's run would read the
    text, and the other's size, context, length and time on this machine, which is measured."""
    run = Settings(**vars(config) | keys)
    speed, device = tokens_per_second(run, vocab_size)
    seconds = run.max_steps * run.global_batch_tokens / speed
    hours = f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.0f} hours"
    lines = [f"note: {config.max_steps:,} steps of {config.global_batch_tokens:,} tokens would "
             f"read this text {passes_of(config, splits):,.1f} times",
             f"suggested: {run.n_layer} layers of {run.d_model}, context {run.block_size}, "
             f"{run.max_steps:,} steps of {run.global_batch_tokens:,} tokens, "
             f"{passes_of(run, splits):.1f} times the text: about {hours} here ({device}, "
             f"{speed:,.0f} tokens/s, eager, measured for a moment)"]
    if all(getattr(run, name) == value for name, value in SHAPES[0].items()):
        lines.append(f"for comparison: {ENDED}")
    return lines


def tokens_per_second(run: Settings, vocab_size: int) -> tuple[float, str]:
    """Measure for SECONDS how many tokens a second go through a run's model forwards and backwards
    on this machine, without the optimizer; also on which device."""
    import torch

    from model import LLaMA, ModelConfig
    from plainllama.parallel import pick_device, pick_dtype

    device = torch.device(pick_device(run.device))
    config = ModelConfig(run.n_layer, run.n_head, run.d_model, run.d_ff, vocab_size, run.block_size,
                         run.n_kv_head)
    with device:
        model = LLaMA(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        rows = min(8 if device.type == "cpu" else 32, run.global_batch_tokens // run.block_size)
        ids = torch.randint(vocab_size, (rows, run.block_size))
    began = done = 0.0
    for turn in range(1000):  # the first one is not counted
        with torch.autocast(device.type, pick_dtype("auto", device), device.type == "cuda"):
            model(ids, ids).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        done = time.perf_counter()
        began = began or done
        if turn and done - began > SECONDS:
            break
    return turn * ids.numel() / (done - began), device.type
