"""Adapters on disk, as the package peft has them, and the models that they make of their bases.

An adapter's folder holds adapter_config.json and adapter_model.safetensors, which peft reads and
writes, beside them config.json of the whole model and base.json: where the base lies, the sha256 of
its weights, and how it was held. What peft would only warn of is an error here: an unknown or
missing key, another base.
"""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model import Linear, LLaMA, ModelConfig
from plainllama.files import read_json, sha256, sha256_bytes, write_json
from plainllama.parallel import World
from plainllama.settings import Settings, UserError
from plainllama.tokens.tokenizer_json import TEMPLATE_FILE, byte_info
from plainllama.weights import adapters, expansion
from plainllama.weights.adapters import ADDED, Adapter, initialise
from plainllama.weights.huggingface import (
    ENDS,
    load_weights,
    read_config,
    refuse_rounding,
    weight_files,
)

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
FORMAT = 1
ROWS = "token_adapter.trainable_tokens_delta"  # peft's name of the rows of new tokens
# Keys of adapter_config.json that say nothing of what is computed, or that are read here; any other
# must be off.
READ = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
        "revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha",
        "lora_dropout", "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern",
        "megatron_core", "trainable_token_indices", "qalora_group_size", "ensure_weight_tying"}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and not a whole model."""
    return (folder / CONFIG).is_file()


# ---- written

def write_adapter(folder: Path, weights: dict[str, Tensor], adapter: Adapter,
                  config: ModelConfig) -> None:
    """Write an adapter's weights, by our names, and what it is, with which peft opens it."""
    saved = {peft_name(name): weight.contiguous() for name, weight in weights.items()}
    save_file(saved, folder / WEIGHTS, {"format": "pt"})
    new = list(range(adapter.first_row, config.vocab_size)) if adapter.first_row else None
    ends = new if config.tie_embeddings or not new else {"embed_tokens": new, "lm_head": new}
    write_json(folder / CONFIG, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none",
        "base_model_name_or_path": adapter.base, "r": adapter.r, "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout, "target_modules": short_targets(adapter, config),
        "trainable_token_indices": ends})
    write_json(folder / BASE, {"format": FORMAT, "path": adapter.base, "sha256": adapter.sha256,
                               "frozen_dtype": adapter.frozen_dtype})


def peft_name(name: str) -> str:
    """Name a parameter as peft does."""
    module, _, last = name.rpartition(".")
    return f"base_model.model.{module}.{ROWS if last == 'rows' else f'{last}.weight'}"


def our_name(name: str) -> str:
    """Name a parameter as we do: peft_name backwards."""
    inner = name.removeprefix("base_model.model.")
    return inner.replace(ROWS, "rows") if inner.endswith(ROWS) else inner.removesuffix(".weight")


def short_targets(adapter: Adapter, config: ModelConfig) -> list[str]:
    """Name the targets by their last words, if these are the same in all blocks."""
    last = sorted({name.rpartition(".")[2] for name in adapter.targets})
    everywhere = len(adapter.targets) == len(last) * config.n_layer
    return last if everywhere else list(adapter.targets)


# ---- read

def read_adapter(folder: Path) -> Adapter:
    """Read what an adapter is. UserError with the reason for one that computes what we do not."""
    hf, path = read_json(folder / CONFIG), folder / CONFIG
    ours: dict = read_json(folder / BASE) if (folder / BASE).is_file() else {"format": FORMAT}
    if ours["format"] != FORMAT:
        raise UserError(f"{folder / BASE} has format {ours['format']}, not {FORMAT}; use the "
                        "plainllama that wrote it")
    asked = [key for key in sorted(hf.keys() - READ) if hf[key] and (key, hf[key]) != ("bias",
                                                                                       "none")]
    if isinstance(hf.get("init_lora_weights"), str) and hf["init_lora_weights"] != "gaussian":
        asked.append(f"init_lora_weights={hf['init_lora_weights']}, which changes the base")
    if hf.get("peft_type") != "LORA" or asked:
        what = ", ".join(asked) or f"peft_type {hf.get('peft_type')!r}"
        raise UserError(f"{path}: only plain LoRA can be read, with rsLoRA or without; this asks "
                        f"for {what}")
    stored = [our_name(key) for key in open_weights(folder).keys()]  # noqa: SIM118
    targets = tuple(name.removesuffix(".lora_A") for name in stored if name.endswith("lora_A"))
    try:
        r, alpha = int(hf["r"]), float(hf["lora_alpha"])
        if r < 1 or not targets:
            raise ValueError(f"r {r} with {len(targets)} targets")
        new = hf.get("trainable_token_indices") or []
        lists = list(new.values()) if isinstance(new, dict) else [new]
        first = min(lists[0], default=0)
        if any(sorted(ids) != list(range(first, first + len(ids))) for ids in lists):
            raise ValueError("trainable_token_indices are not the new rows at the end")
        factor = math.sqrt(r) if hf.get("use_rslora") else 1.0  # alpha / sqrt(r)
        return Adapter(r, alpha * factor, float(hf.get("lora_dropout") or 0), targets,
                       ours.get("frozen_dtype", "fp32"), first,
                       ours.get("path") or hf.get("base_model_name_or_path") or "",
                       ours.get("sha256", ""))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is not the config of a LoRA: {error!r}") from None


def open_weights(folder: Path):
    """Open an adapter's file of weights."""
    try:
        return safe_open(folder / WEIGHTS, "pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the adapter's weights cannot be read: {error}; copy it "
                        "again") from None


def base_of(folder: Path, moved: str = "") -> tuple[Path, Adapter]:
    """Find the base that an adapter's folder belongs to, at the place that it names or at `moved`.
    UserError if it is not there, or has other weights."""
    adapter = read_adapter(folder)
    named, name = moved or adapter.base, Path(adapter.base).name
    base = found_in(Path(named), adapter) if named else None
    if not base:
        there = moved and Path(moved).exists()
        lacks = f"holds no model, and no checkpoint {name}" if there else "is not there"
        raise UserError(f"{folder} is an adapter of the model {adapter.base or '(none)'}; "
                        f"{named or '(none)'} {lacks}; say where the base is now with "
                        "--base=FOLDER, to train.py with --init_from=FOLDER")
    if adapter.sha256 and weights_sha256(base) != adapter.sha256:
        raise UserError(f"{folder} is an adapter of other weights than those in {base}; say where "
                        "its base is with --base=FOLDER")
    if (entries := read_config(base).vocab_size) < adapter.first_row:
        raise UserError(f"{folder} learned the vocabulary from entry {adapter.first_row} on, "
                        f"{base} has only {entries}: they do not belong together")
    return base, adapter


def found_in(home: Path, adapter: Adapter) -> Path | None:
    """Find the base of an adapter: a whole model in a folder or, by the name of its checkpoint, in
    a run or a folder of runs; of several that of its hash. UserError if nothing chooses."""
    name = Path(adapter.base).name
    places = (home, *home.glob("checkpoints/*"), *home.glob("*/checkpoints/*"))
    found = [place for place in places if (place == home or place.name == name)
             and (place / "config.json").is_file() and not is_adapter(place)]
    if len(found) > 1 and not adapter.sha256:
        raise UserError(f"{home} holds {len(found)} models {name}, and nothing says which is the "
                        f"adapter's base; name one of {', '.join(map(str, sorted(found)))}")
    right = (place for place in found[1:] and found if weights_sha256(place) == adapter.sha256)
    return next(right, found[0] if found else None)


def weights_sha256(folder: Path) -> str:
    """Hash a model's weights: of one file its sha256, of several that of their names and hashes."""
    hashes = [(name, hashed(folder / name, (folder / name).stat().st_mtime_ns))
              for name in weight_files(folder)]
    if len(hashes) == 1:
        return hashes[0][1]
    return sha256_bytes("".join(f"{found}  {name}\n" for name, found in hashes).encode())


@cache
def hashed(path: Path, changed: int) -> str:
    """Hash a file that last `changed` then: a process asks for its base's several times."""
    return sha256(path)


def model_sha256(folder: Path, moved: str = "") -> str:
    """Hash what a folder's model and tokenizer are, by checksums.json where there is one; of an
    adapter that peft saved, its base too."""
    names, homes, model = ["checksums.json"], [folder], ""  # the hashes of all the others
    if not (folder / names[0]).is_file():
        names = [CONFIG, WEIGHTS, "config.json", "tokenizer.json", TEMPLATE_FILE]
        homes += [base_of(folder, moved)[0]] if is_adapter(folder) else []
        model = weights_sha256(homes[-1])
    there = [home / name for home in homes for name in names if (home / name).is_file()]
    return sha256_bytes((model + "".join(map(sha256, there))).encode())


def whole_config(folder: Path, moved: str = "") -> ModelConfig:
    """Read the architecture of a model folder; of an adapter's, that of the model it makes."""
    if not is_adapter(folder):
        return read_config(folder)
    adapter, whole = read_adapter(folder), (folder / "config.json").is_file()
    config = read_config(folder if whole else base_of(folder, moved)[0])
    stored = open_weights(folder)
    rows = [stored.get_slice(key).get_shape()[0]
            for key in stored.keys() if key.endswith(ROWS)]  # noqa: SIM118
    entries = adapter.first_row + rows[0] if rows else config.vocab_size
    if entries < config.vocab_size:
        raise UserError(f"{folder}: trainable_token_indices are not the last of the vocabulary")
    return replace(config, vocab_size=entries)


def tokenizer_folder(folder: Path, moved: str = "") -> Path:
    """Choose the folder whose tokenizer a model reads by: its own or, of an adapter that has none,
    its base's."""
    if is_adapter(folder) and not (folder / "tokenizer.json").is_file():
        return base_of(folder, moved)[0]
    return folder


def load_adapter(folder: Path, model: LLaMA, world: World) -> None:
    """Copy an adapter's weights into the `model` that it was attached to. UserError if one is
    missing, unknown or of another shape."""
    file = open_weights(folder)
    stored = {our_name(key): file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    wanted = {name: p for name, p in model.named_parameters() if name.endswith(ADDED)}
    for what, names in (("missing", wanted.keys() - stored), ("unknown", stored.keys() - wanted)):
        if names:
            raise UserError(f"{folder}: {len(names)} {what} weights of the adapter, the first is "
                            f"{min(names)}")
    for name, parameter in wanted.items():
        if stored[name].get_shape() != list(parameter.shape):
            raise UserError(f"{folder}: {name} has shape {stored[name].get_shape()}, "
                            f"{list(parameter.shape)} is asked for")
        local, first = world.piece(parameter.data)
        with torch.no_grad():
            local.copy_(stored[name][first:first + local.shape[0]])


def load_model(folder: Path, device="cpu", dtype: torch.dtype = torch.float32, base: str = "",
               original: bool = False, kept: dict | None = None) -> LLaMA:
    """Load the model of a checkpoint, an adapter or another Hugging Face LLaMA folder, in eval
    mode, its matmuls in `dtype`. An adapter is merged, unless its base is held in few bits.

    `base`: where an adapter's base lies now; `original`: take that as it is, and not as it was held
    when the adapter learned. With `kept` adapters are not merged, and the next one of the same base
    takes its model over from there. UserError if the tokenizer in the folder has more entries than
    the embedding.
    """
    if base and not is_adapter(folder):
        raise UserError(f"--base is for adapters; {folder} is a whole model")
    config = whole_config(folder, base)
    if (folder / "tokenizer.json").is_file():
        entries = len(byte_info(folder).lengths)
        if entries > config.vocab_size:
            raise UserError(f"{folder}: its tokenizer has {entries} entries, the model's embedding "
                            f"only {config.vocab_size}; they do not belong together")
    world = World(device=device)
    same = (replace(read_adapter(folder), dropout=0.0), config) if is_adapter(folder) else None
    if kept is not None and same in kept:
        load_adapter(folder, kept[same], world)
        return kept[same]
    home, adapter = base_of(folder, base) if is_adapter(folder) else (folder, None)
    if adapter and not adapter.sha256:
        print(f"{folder} does not say which weights of {home} it belongs to: not checked")
    if kept:
        kept.clear()  # one base at a time
    with torch.device("meta"):
        model = expansion.outline(config)
    if adapter:
        adapter = replace(adapter, frozen_dtype="fp32") if original else adapter
        adapters.attach(model, adapter)
    world.place(model, dtype)
    load_weights(home, model, world, grows=bool(adapter and adapter.first_row))
    if adapter:
        load_adapter(folder, model, world)
        if kept is not None:
            kept[same] = model
        elif not any(adapters.quantised(model)):
            adapters.merge(model, dtype)
    for module in model.modules():
        if isinstance(module, Linear) and module.weight is not None:
            # once instead of at every token: the same numbers
            module.weight.data = module.weight.data.to(dtype)
    return model.eval()


# ---- a run's

def adapter_for(model: LLaMA, config: Settings, source: Path | None) -> Adapter | None:
    """What a run's adapter is, None if it has none. `source`: the base, or the adapter that the run
    goes on with. UserError if that is another than the config's."""
    if not config.lora_r:
        if source and is_adapter(source):
            raise UserError(f"{source} is an adapter: train it on with its own --lora_r, or make a "
                            f"model of it first: python export.py --ckpt {source} --merge --to DIR")
        return None
    wanted = Adapter(config.lora_r, config.lora_alpha, config.lora_dropout,
                     adapters.targets_of(model, config.lora_targets), config.frozen_dtype)
    if not source:
        return wanted
    if not is_adapter(source):
        first = expansion.first_new(source, read_config(source).vocab_size, config)
        return replace(wanted, base=str(source.resolve()), sha256=weights_sha256(source),
                       first_row=first)
    found = read_adapter(source)
    keys = {"lora_r": "r", "lora_alpha": "alpha", "frozen_dtype": "frozen_dtype"}
    other = [f"--{key}={getattr(found, name)}" for key, name in keys.items()
             if getattr(found, name) != getattr(wanted, name)]
    if other or sorted(found.targets) != sorted(wanted.targets):
        names = ",".join(short_targets(found, model.config))
        raise UserError(f"{source} is another adapter than the config's; to go on with it say "
                        f"{' '.join(other) or f'--lora_targets={names}'}")
    entries = whole_config(source).vocab_size
    first = expansion.first_new(tokenizer_folder(source), entries, config)
    if first and not (0 < found.first_row <= first and entries == config.vocab_size):
        raise UserError(f"{source} is an adapter that knows {first} entries of the vocabulary, the "
                        "data set has more; make a model of it first: python export.py --ckpt "
                        f"{source} --merge --to DIR")
    base, _ = base_of(source, moved_base(found, config))
    return replace(found, dropout=wanted.dropout, targets=wanted.targets,
                   base=str(base.resolve()), sha256=found.sha256 or weights_sha256(base))


def lost_its_base(folder: Path) -> bool:
    """Whether a folder holds an adapter whose base, known by its hash, is not where it was."""
    adapter = read_adapter(folder) if is_adapter(folder) else None
    return bool(adapter and adapter.sha256 and not Path(adapter.base, "config.json").is_file())


def moved_base(adapter: Adapter, config: Settings) -> str:
    """Where the run's own config has an adapter's base, if it is not where the adapter says; the
    hash guards it."""
    if adapter.base and Path(adapter.base, "config.json").is_file():
        return ""
    return str(found_in(Path(config.init_from), adapter) or "")


def load_start(model: LLaMA, config: Settings, source: Path | None, adapter: Adapter | None,
               world: World) -> None:
    """Give a run's model, which exists already, its first weights or those of `source`: of an
    adapter's base, and the adapter's on top."""
    base = Path(adapter.base) if adapter and adapter.base else source
    if not base:
        initialise(model, config.seed, world.piece)
        adapters.hold_first_weights(model, config.seed)
        expansion.begin(model)
        return
    theirs = read_config(base)
    grows = theirs.vocab_size < model.config.vocab_size
    initialise(model, config.seed, world.piece, (*ADDED, *(ENDS if grows else ())))
    if config.frozen_dtype == "bf16" and not adapter:
        refuse_rounding(base, model)  # a run at work may have deleted what was tried
    expands = not theirs.expand_blocks
    load_weights(base, model, world, grows, expands)
    if expands:
        expansion.begin(model)
    if source and is_adapter(source):
        load_adapter(source, model, world)
