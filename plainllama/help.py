"""What --help prints, and what is said of a name that is none."""

import difflib
import textwrap
from dataclasses import fields

from plainllama.foreign import NAMES
from plainllama.settings import Settings, nearest

# what people change, in the order in which they come to it; the others stand behind, by group
FIRST = ("sources", "dataset", "tokenizer", "documents", "out_dir", "max_steps", "epochs",
         "global_batch_tokens", "block_size", "n_layer", "d_model", "n_head", "d_ff", "optimizer",
         "learning_rate", "min_lr", "schedule", "warmup_steps", "init_from", "lora_r", "seed",
         "max_minutes", "eval_interval", "save_interval", "val_fraction")
# the first key of each group of Settings
GROUPS = {"dataset": "data", "n_layer": "model", "train_only": "what learns",
          "objective": "training", "log_interval": "cadence"}
KEYS = tuple(item.name for item in fields(Settings))
CHOICES = {item.name: item.metadata["choices"] for item in fields(Settings)}


def help_text(doc: str | None, known: dict, config_file: str = "",
              values: dict | None = None) -> str:
    """Give the command's docstring and a line for every option of `known`, name -> field, those of
    a config sorted by what is changed first; beside a default what the config file has instead,
    whose `values` these are."""
    first = [name for name in FIRST if name in known]
    lines = [(doc or "").strip(), "", "options:"]
    lines += [option(known[name]) for name in known if name not in KEYS]
    if first:
        lines.append("\n  what is changed first (config file or command line)")
    lines += [option(known[name], config_file, values) for name in first]
    group, begun = "", ""
    for name in KEYS if first else ():
        group = GROUPS.get(name, group)
        if name in known and name not in first:
            lines += [f"\n  {group}"] if group != begun else []
            lines.append(option(known[name], config_file, values))
            begun = group
    return "\n".join(lines)


def option(item, config_file: str = "", values: dict | None = None) -> str:
    """Give the line of an option."""
    choices = " | ".join(item.metadata["choices"])
    why = item.metadata["why"] + (f": {choices}" if choices else "")
    value = (values or {}).get(item.name, item.default)
    here = f"[{config_file}: {value!s:.60}] " if value != item.default else ""
    line = f"  --{item.name + '=' + str(item.default):<36} {here}{why}"
    return textwrap.fill(line, 100, subsequent_indent=" " * 41, break_long_words=False,
                         break_on_hyphens=False)


def unknown(name: str, known) -> str:
    """Say what could be meant by a name that is none of `known`: what other programs call so, a key
    of training, the nearest of the known and of those of others; or why there is none."""
    last = name.rpartition(".")[2]  # of the nested keys of litgpt and torchtune
    if last != name and last in known:
        return f"; here it is {last}"
    name = last
    if name in KEYS:
        return "; here it is ckpt" if name == "out_dir" and "ckpt" in known else (
            "; it is a key of train.py")
    if name not in NAMES:
        theirs = difflib.get_close_matches(name, NAMES, 1, 0.85)
        return nearest(name, known, 0.7) or (unknown(theirs[0], known) if theirs else
                                             "; --help lists what there is")
    ours, remark = NAMES[name]
    if not ours:
        return f"; there is none here: {remark}"
    places = [place.rpartition(" --") for place in ours.split(" | ")]
    here = [number for number, (_, _, option) in enumerate(places) if option in known]
    which = here[0] if here else 0
    command, _, option = places[which]
    told = option if here else f"--{option} of {command or 'train.py'}"
    remarks = remark.split(" | ")
    remark = remarks[which] if len(remarks) == len(places) else remark
    remark = remark or " | ".join(CHOICES.get(option, ()))
    return f"; here it is {told}{f' ({remark})' if remark else ''}"
