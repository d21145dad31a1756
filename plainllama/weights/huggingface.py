"""Hugging Face folders of LLaMA-family models, written and read here alone: config.json,
generation_config.json, the tokenizer's files, the weights.

transformers 4 reads and writes rope_theta and rope_scaling, transformers 5 rope_parameters alone.
We write both and read either. What a config asks for beyond a plain LLaMA is refused by name: a
model that computes something else must never open.
"""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model import LLaMA, ModelConfig
from plainllama.files import CHECKOUT, read_json, write_json
from plainllama.parallel import World
from plainllama.settings import UserError
from plainllama.tokens.templates import answer_ends
from plainllama.tokens.tokenizer_json import boundaries, read_template, write_hf_files
from plainllama.weights.adapters import AdaptedLinear, base_weights

# ModelConfig's name -> Hugging Face's, in the order of config.json; the first seven must be there
NAMES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "d_model": "hidden_size",
         "d_ff": "intermediate_size", "vocab_size": "vocab_size", "norm_eps": "rms_norm_eps",
         "block_size": "max_position_embeddings", "kv_heads": "num_key_value_heads",
         "head_dim": "head_dim", "tie_embeddings": "tie_word_embeddings"}
REQUIRED = ("n_layer", "n_head", "d_model", "d_ff", "vocab_size", "norm_eps", "block_size")
# rope_scaling -> what this kind of RoPE needs beside its base: ModelConfig's name -> Hugging Face's
ROPE = {"none": {}, "linear": {"rope_factor": "factor"}, "llama3": {
    "rope_factor": "factor", "rope_low": "low_freq_factor", "rope_high": "high_freq_factor",
    "rope_original": "original_max_position_embeddings"}}
# of ModelConfig: what a model has that grew
GROWN = ("expand", "expand_blocks", "expand_merge", "first_row")
ROPE_KEYS = {"rope_type", "type", "rope_theta", *ROPE["linear"].values(), *ROPE["llama3"].values()}
ENDS = ("model.embed_tokens.weight", "lm_head.weight")  # a row for each entry of the vocabulary
INDEX = "model.safetensors.index.json"  # which file of several holds which weight

# ---- written


def write_folder(folder: Path, config: ModelConfig, weights: dict[str, Tensor],
                 tokenizer_json: Path, dtype=torch.float32, shard_bytes: int = 0) -> None:
    """Write the files with which transformers opens a model: its weights as `dtype`, in shards of
    at most `shard_bytes` (0: in one file)."""
    write_description(folder, config, tokenizer_json, dtype)
    write_weights(folder, weights, dtype, shard_bytes)


def write_description(folder: Path, config: ModelConfig, tokenizer_json: Path,
                      dtype=torch.float32, template: str = "") -> None:
    """Write all files of a model's folder but its weights; `template`: of dialogs, where none lies
    beside the tokenizer."""
    write_hf_files(tokenizer_json, folder, config.block_size, template)
    spec = read_json(folder / "tokenizer.json")
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    begin, end = boundaries(spec)
    bos, eos = ids.get(begin), ids.get(end or begin)
    answers = [ids[name] for name in sorted(answer_ends(read_template(folder), spec))]
    ends = [eos, *(i for i in answers if i != eos)] if answers else eos  # of texts, and of answers
    write_json(folder / "config.json", config_json(config, bos, eos, dtype))
    write_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": ends})


def config_json(config: ModelConfig, bos: int | None, eos: int | None, dtype=torch.float32) -> dict:
    """Describe an architecture as config.json of LlamaForCausalLM does, its RoPE in the form of
    transformers 4 and in that of 5."""
    kind = str(dtype).removeprefix("torch.")
    stretch = {theirs: getattr(config, ours) for ours, theirs in ROPE[config.rope_scaling].items()}
    rope = {"rope_type": config.rope_scaling if stretch else "default", **stretch}
    names: dict = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if config.expand_blocks:  # which transformers must not take for what it knows
        names = {"architectures": ["PlainLlamaExpanded"], "model_type": "plainllama",
                 "plainllama": {name: getattr(config, name) for name in GROWN}}
    return {**names, **{theirs: getattr(config, ours) for ours, theirs in NAMES.items()},
            "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
            "rope_theta": config.rope_theta, "rope_scaling": rope if stretch else None,
            "rope_parameters": rope | {"rope_theta": config.rope_theta},
            "initializer_range": 0.02, "use_cache": True, "bos_token_id": bos, "eos_token_id": eos,
            "torch_dtype": kind, "dtype": kind}


def write_weights(folder: Path, weights: dict[str, Tensor], dtype=torch.float32,
                  shard_bytes: int = 0) -> None:
    """Write model.safetensors or, if that were larger, shards of `shard_bytes` and their index. A
    single weight may be larger than that."""
    sizes = {name: weight.numel() * dtype.itemsize for name, weight in weights.items()}
    shards: list[dict[str, Tensor]] = [{}]
    for name, weight in weights.items():
        filled = sum(sizes[other] for other in shards[-1])
        if shard_bytes and shards[-1] and filled + sizes[name] > shard_bytes:
            shards.append({})
        shards[-1][name] = weight
    file_of: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        name = f"model{part}.safetensors"
        save_file({key: weight.to(dtype).contiguous() for key, weight in shard.items()},
                  folder / name, {"format": "pt"})
        shutil.copymode(folder / "config.json", folder / name)  # others may read it too
        file_of |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())},
                                    "weight_map": file_of})


def described(config: ModelConfig) -> dict:
    """An architecture by ModelConfig's names; of a plain LLaMA without what only others have."""
    return {name: value for name, value in vars(config).items()
            if config.expand_blocks or name not in GROWN}


def write_code(folder: Path, config: ModelConfig) -> None:
    """Put our own model beside the weights and say in config.json that it is there."""
    for name in ("model.py", "plainllama/weights/modeling_plainllama.py"):
        shutil.copyfile(CHECKOUT / name, folder / Path(name).name)
    code = "modeling_plainllama.PlainLlama"
    write_json(folder / "config.json", read_json(folder / "config.json") | {
        "model_type": "plainllama", "architectures": ["PlainLlamaForCausalLM"],
        "plainllama": described(config),
        "auto_map": {"AutoConfig": f"{code}Config", "AutoModelForCausalLM": f"{code}ForCausalLM"}})


# ---- the architecture, read

def read_config(folder: Path) -> ModelConfig:
    """Read the architecture of a Hugging Face folder (config.json): a Llama, a Mistral without
    sliding window, or what `export.py --code` writes. What it does not say is transformers' default
    for its model_type. UserError with the reason for any other architecture."""
    path, only = folder / "config.json", "only plain LLaMA models can be read"
    hf = read_json(path)
    if lacking := sorted({NAMES[name] for name in REQUIRED} - hf.keys()):
        raise UserError(f"{path}: it does not say {', '.join(lacking)} "
                        f"(model_type {hf.get('model_type')!r}); {only}")
    try:
        rope = {"rope_theta": hf.get("rope_theta", 10000.0),
                **(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
        kind = rope.get("rope_type", rope.get("type", "default"))
        heads = hf.get("num_key_value_heads", 8 if hf.get("model_type") == "mistral" else None)
        config = ModelConfig(
            **{ours: hf[NAMES[ours]] for ours in REQUIRED}, n_kv_head=heads or 0,
            tie_embeddings=hf.get("tie_word_embeddings", False), rope_theta=rope["rope_theta"],
            rope_scaling="none" if kind == "default" else kind,
            **{name: value for name, value in (hf.get("plainllama") or {}).items()
               if name in GROWN},
            **{ours: rope[theirs] for ours, theirs in ROPE.get(kind, {}).items()})
        for name, field in ModelConfig.__dataclass_fields__.items():
            value = getattr(config, name)
            if field.type in (int, float) and not (type(value) in (int, field.type) and value >= 0):
                raise ValueError(f"{NAMES.get(name, name)} is {value!r}")
        refused = refusals(hf, rope, config)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} is not the config of a LLaMA: {error!r}") from None
    if refused:
        raise UserError(f"{path}: {', '.join(refused)}; {only}")
    return config


def refusals(hf: dict, rope: dict, config: ModelConfig) -> list[str]:
    """Say what a config.json asks for that we do not compute. `rope`: both of its descriptions of
    RoPE, merged."""
    window = 4096 if hf.get("model_type") == "mistral" else None  # what it has if it does not say
    fields = ModelConfig.__dataclass_fields__.keys()
    asked = {"hidden_act": "silu", "sliding_window": window} | hf | {
        "RoPE type": config.rope_scaling, "unknown keys of RoPE": sorted(rope.keys() - ROPE_KEYS),
        "layer_types": sorted({*(hf.get("layer_types") or ())} - {"full_attention"}),
        "keys of a newer plainllama": sorted((hf.get("plainllama") or {}).keys() - fields)}
    only: dict[str, tuple] = {
        "model_type": ("llama", "mistral", "plainllama"), "RoPE type": tuple(ROPE),
        "hidden_act": ("silu",), "head_dim": (None, config.head_dim), **dict.fromkeys(
            ("attention_bias", "mlp_bias", "sliding_window", "quantization_config", "layer_types",
             "unknown keys of RoPE", "keys of a newer plainllama"), (None, False, [], {}))}
    found = [f"{key} is {asked.get(key)!r}" for key in only if asked.get(key) not in only[key]]
    if any(form.get(name, value) != value for name, value in rope.items()
           for form in (hf, hf.get("rope_scaling") or {})):
        found.append("rope_scaling and rope_theta say something else than rope_parameters")
    grown = {name: getattr(config, name) for name in GROWN}
    sound = (config.expand in ("concat", "stack", "hybrid") and config.first_row < config.vocab_size
             and config.expand_merge in ("lerp", "dlerp")
             and 0 < config.expand_blocks <= config.n_layer)
    if not sound and grown != {name: getattr(ModelConfig, name) for name in GROWN}:
        found.append(f"its expansion is {grown}")
    heads, kv, width = config.n_head, config.kv_heads, config.d_model
    if config.head_dim % 2 or width % heads or heads % kv:
        found.append(f"{heads} heads, {kv} of keys and values, do not fit a width of {width}")
    return found


def other_keys(theirs: ModelConfig, ours: ModelConfig) -> str:
    """Name every key to set so that the architecture `ours` can go on from weights of `theirs`:
    '--n_layer=2 --n_head=4 ...'; '' if it can.

    The context may differ, and positions may be stretched, or stretched further, than they were:
    that is how context grows. A stretch that the weights have learnt is not taken away.
    """
    names = ["n_layer", "n_head", "kv_heads", "d_model", "d_ff", "vocab_size", "rope_theta",
             "norm_eps", "tie_embeddings"]
    kinds = {(config.rope_scaling, config.rope_original) for config in (theirs, ours)}
    stretched_on = len(kinds) == 1 and ours.rope_factor >= theirs.rope_factor
    if theirs.rope_scaling != "none" and not stretched_on:
        names += ["rope_scaling", "rope_factor", "rope_original"]
    turns = (theirs.rope_low, theirs.rope_high)
    if theirs.rope_scaling == "llama3" and turns != (ours.rope_low, ours.rope_high):
        raise UserError(f"low_freq_factor, high_freq_factor of {turns} cannot be trained on")
    if theirs.expand_blocks:
        names += GROWN[:3]
    keys = [f"--{name}={getattr(theirs, name)}" for name in names
            if getattr(theirs, name) != getattr(ours, name)]
    return " ".join(keys).replace("kv_heads", "n_kv_head")


# ---- the weights, read

def fitting(folder: Path, model: LLaMA, grows: bool = False, expands: bool = False) -> dict:
    """Open the weights of a model folder; UserError if they are not those of `model`. As for
    load_weights()."""
    stored = open_weights(folder)
    if model.config.tie_embeddings:
        stored.pop("lm_head.weight", None)
    wanted = base_weights(model, copies=not expands)
    for what, names in (("missing", wanted.keys() - stored), ("unknown", stored.keys() - wanted)):
        if names:
            raise UserError(f"{folder}: {len(names)} {what} weights, the first is {min(names)}")
    for name, place in wanted.items():
        if isinstance(place, AdaptedLinear):
            expected = [place.out_features, place.in_features]
        else:
            expected = list(place.shape)
        shape = stored[name].get_shape()
        entries = min(shape[0], expected[0]) if grows and name in ENDS else expected[0]
        if shape != [entries, *expected[1:]]:
            raise UserError(f"{folder}: {name} has shape {shape}, the config says {expected}")
    return stored


def load_weights(folder: Path, model: LLaMA, world: World, grows: bool = False,
                 expands: bool = False) -> None:
    """Copy the weights of a model folder into `model`'s parameters, which exist already: a tensor
    mapped from a file may be unaligned, and alignment changes the bits of a matmul. If the model
    `grows`, it may have more entries in its vocabulary, whose rows stay as they are. `expands`: its
    copies of blocks stay as they are, the folder has none."""
    stored = fitting(folder, model, grows, expands)
    for name, place in base_weights(model, copies=not expands).items():
        if isinstance(place, AdaptedLinear):
            place.hold(stored[name][:].to(world.device))
            continue
        local, first = world.piece(place.data)
        last = min(first + local.shape[0], stored[name].get_shape()[0])
        if first < last:
            local[:last - first].copy_(stored[name][first:last])
    for name, place in model.named_parameters():
        if name.endswith(".rows"):  # a folder has them in their matrix, as many as it has
            matrix, (local, first) = stored[name.replace("rows", "weight")], world.piece(place.data)
            before = model.config.vocab_size - len(place)
            found = matrix[before + first:before + first + len(local)]
            local[:len(found)].copy_(found)


def open_weights(folder: Path) -> dict:
    """Open a model folder's weights by name, as slices of the files, of which rows are read later;
    without the rotary tables of old folders."""
    try:
        shards = [safe_open(folder / name, "pt") for name in weight_files(folder)]
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: its weights cannot be read: {error}; copy it again") from None
    return {name: shard.get_slice(name) for shard in shards
            for name in shard.keys() if "rotary_emb" not in name}  # noqa: SIM118


def refuse_rounding(folder: Path, model: LLaMA) -> None:
    """Refuse a folder of weights that have other bits in bf16 where `model` holds them so."""
    stored = open_weights(folder)
    first = model.config.first_row or model.config.vocab_size  # those from there on learn
    for name, place in model.named_parameters():
        held = place.dtype == torch.bfloat16 and name in stored
        if held and stored[name].get_dtype() != "BF16":
            weight = stored[name][:first] if name in ENDS else stored[name][:]
            if not torch.equal(weight, weight.bfloat16().to(weight.dtype)):
                raise UserError(f"frozen_dtype=bf16 would round {name} of {folder}, and a "
                                "checkpoint that is no adapter's holds what is frozen; say "
                                "frozen_dtype=fp32")


def weight_files(folder: Path) -> list[str]:
    """Name a model folder's weight files, as transformers looks for them: one, or what an index
    names. UserError if one of them is missing."""
    names, index = ["model.safetensors"], folder / INDEX
    if index.is_file() and not (folder / names[0]).is_file():
        try:
            names = sorted(set(read_json(index, tolerant=True)["weight_map"].values()))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is not an index of weights: {error!r}") from None
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index} names {name!r}, outside the folder")
        if not (folder / name).is_file():
            pickled = any(folder.glob("pytorch_model*.bin"))
            remedy = "convert its pickled weights" if pickled else "copy the folder again"
            raise UserError(f"{folder}: {name} is missing; {remedy}")
    return names
