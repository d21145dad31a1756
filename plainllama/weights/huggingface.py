"""Folders of LLaMA-family models: config.json, written and read, and the weights, read.

transformers 4 reads and writes rope_theta and rope_scaling, transformers 5 rope_parameters alone.
We write both and read either. What a config asks for beyond a plain LLaMA is refused by name: a
model that computes something else must never open.
"""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import LLaMA, ModelConfig
from plainllama.files import write_json
from plainllama.parallel import World
from plainllama.settings import UserError
from plainllama.tokens.tokenizer_json import byte_info

# ModelConfig's name -> Hugging Face's
NAMES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "d_model": "hidden_size",
         "d_ff": "intermediate_size", "vocab_size": "vocab_size", "norm_eps": "rms_norm_eps",
         "block_size": "max_position_embeddings", "kv_heads": "num_key_value_heads",
         "head_dim": "head_dim", "tie_embeddings": "tie_word_embeddings"}
ROPE = {"rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
        "original_max_position_embeddings"}  # all that we know in rope_scaling or rope_parameters


def config_json(config: ModelConfig, bos: int | None, eos: int | None) -> dict:
    """config.json of LlamaForCausalLM. RoPE is written in both forms: transformers 4 reads only
    rope_theta and rope_scaling, transformers 5 writes only rope_parameters."""
    scaling = None
    if config.rope_scaling != "none":
        scaling = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if scaling and config.rope_scaling == "llama3":
        scaling |= {"low_freq_factor": config.rope_low, "high_freq_factor": config.rope_high,
                    "original_max_position_embeddings": config.rope_original}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
            **{theirs: getattr(config, ours) for ours, theirs in NAMES.items()},
            "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
            "rope_theta": config.rope_theta, "rope_scaling": scaling,
            "rope_parameters": {"rope_type": "default", **(scaling or {}),
                                "rope_theta": config.rope_theta},
            "initializer_range": 0.02, "use_cache": True, "bos_token_id": bos, "eos_token_id": eos,
            "torch_dtype": "float32", "dtype": "float32"}


def read_config(folder: Path) -> ModelConfig:
    """The architecture of a Hugging Face folder (config.json): a Llama, a Mistral without sliding
    window, or what `export.py --code` writes. Raises UserError with the reason for any other."""
    path = folder / "config.json"
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
        if lacks := sorted({NAMES[name] for name in ("n_layer", "n_head", "d_model", "d_ff",
                            "vocab_size", "norm_eps", "block_size")} - hf.keys()):
            raise UserError(f"{path}: it does not say {', '.join(lacks)}"
                            f" (model_type {hf.get('model_type')!r}); only plain LLaMA models can "
                            "be read")
        given = [hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {}]
        rope = {"rope_theta": hf.get("rope_theta", 10000.0), **given[0], **given[1]}
        kind = rope.get("rope_type", rope.get("type", "default"))
        # what a file that says nothing means is transformers' default for its model_type
        mistral = hf.get("model_type") == "mistral"
        config = ModelConfig(
            **{ours: hf[theirs] for ours, theirs in NAMES.items()
               if theirs in hf and ours not in ("kv_heads", "head_dim")},
            n_kv_head=hf.get("num_key_value_heads", 8 if mistral else 0) or 0,
            rope_theta=rope["rope_theta"], rope_scaling="none" if kind == "default" else kind,
            rope_factor=rope.get("factor", 1.0) if kind != "default" else 1.0,
            rope_original=rope["original_max_position_embeddings"] if kind == "llama3" else 0,
            rope_low=rope.get("low_freq_factor", 1.0), rope_high=rope.get("high_freq_factor", 4.0))
        window = hf.get("sliding_window", 4096 if mistral else None)
        layers = set(hf.get("layer_types") or ()) - {"full_attention"}
        unknown = rope.keys() - ROPE
        newer = (hf.get("plainllama") or {}).keys() - {field.name for field in fields(ModelConfig)}
        reasons = [
            (hf.get("model_type") in ("llama", "mistral", "plainllama"),
             f"model_type is {hf.get('model_type')!r}, not llama or mistral"),
            (not newer, f"it has {', '.join(sorted(newer))}, the format of a newer plainllama"),
            (not unknown, f"its RoPE has {', '.join(sorted(map(str, unknown)))}, a newer format or "
             "another kind of RoPE"),
            (all(other.get(name, value) == value for other in (given[0], hf)
                 for name, value in given[1].items()),
             "rope_scaling and rope_theta say something else than rope_parameters"),
            (config.rope_scaling in ("none", "linear", "llama3"), f"RoPE of type {kind}"),
            (not hf.get("attention_bias") and not hf.get("mlp_bias"), "it has biases"),
            (not window, f"its attention has a sliding window of {window} tokens"),
            (not layers, f"it has layers of type {', '.join(sorted(layers))}"),
            (not hf.get("quantization_config"), "its weights are quantized"),
            (hf.get("hidden_act", "silu") == "silu", f"hidden_act is {hf.get('hidden_act')}"),
            (hf.get("head_dim") in (None, config.head_dim), "head_dim is not d_model / n_head"),
            (config.head_dim % 2 == 0 and config.d_model % config.n_head == 0
             and config.n_head % config.kv_heads == 0,
             f"{config.n_head} heads, {config.kv_heads} of keys and values, do not fit a width of "
             f"{config.d_model}"),
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} is not the config of a LLaMA: {error!r}") from None
    for holds, reason in reasons:
        if not holds:
            raise UserError(f"{path}: {reason}; only plain LLaMA models can be read")
    return config


def other_keys(theirs: ModelConfig, ours: ModelConfig) -> str:
    """'--n_layer=2 --n_head=4 ...': every key to set so that the architecture `ours` can go on from
    weights of `theirs`; '' if it can.

    The context may differ, and positions may be stretched, or stretched further, than they were:
    that is how context grows. A stretch that the weights have learnt is not taken away.
    """
    names = ["n_layer", "n_head", "kv_heads", "d_model", "d_ff", "vocab_size", "rope_theta",
             "norm_eps", "tie_embeddings"]
    stretched_on = (ours.rope_scaling == theirs.rope_scaling != "none"
                    and ours.rope_factor >= theirs.rope_factor
                    and ours.rope_original == theirs.rope_original)
    if theirs.rope_scaling != "none" and not stretched_on:
        names += ["rope_scaling", "rope_factor", "rope_original"]
    turns = (theirs.rope_low, theirs.rope_high)
    if theirs.rope_scaling == "llama3" and turns != (ours.rope_low, ours.rope_high):
        raise UserError(f"low_freq_factor, high_freq_factor of {turns} can be read but not trained "
                        f"on; we train with {ours.rope_low}, {ours.rope_high}")
    words = {"kv_heads": "n_kv_head"}
    return " ".join(f"--{words.get(name, name)}={getattr(theirs, name)}" for name in names
                    if getattr(theirs, name) != getattr(ours, name))


def load_model(folder: Path, device="cpu", dtype: torch.dtype = torch.float32) -> LLaMA:
    """The model of a checkpoint or other Hugging Face LLaMA folder, in eval mode, its matmuls in
    `dtype`."""
    config = read_config(folder)
    if (folder / "tokenizer.json").is_file() and (
            entries := len(byte_info(folder).lengths)) > config.vocab_size:
        raise UserError(f"{folder}: its tokenizer has {entries} entries, the model's embedding "
                        f"only {config.vocab_size}; they do not belong together")
    with torch.device("meta"):
        model = LLaMA(config)
    model.to_empty(device=device)
    model.reset_derived(device)
    load_weights(folder, model, World())
    model.compute_dtype = dtype
    return model.eval()


def load_weights(folder: Path, model: LLaMA, world: World) -> None:
    """Copy the weights of a model folder into `model`'s parameters, which exist already: a tensor
    mapped from a file may be unaligned, and alignment changes the bits of a matmul."""
    try:
        files = {name: safe_open(folder / name, "pt") for name in weight_files(folder)}
        names = {key: name for name, file in files.items() for key in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: its weights cannot be read: {error}; if it is a copy, copy it "
                        "again") from None
    wanted = dict(model.named_parameters())
    names = {key: name for key, name in names.items() if "rotary_emb" not in key}
    if model.config.tie_embeddings:
        names.pop("lm_head.weight", None)
    if missing := sorted(set(wanted) - set(names)):
        raise UserError(f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}")
    if extra := sorted(set(names) - set(wanted)):
        raise UserError(f"{folder}: unknown weights, the first is {extra[0]}")
    for key, parameter in wanted.items():
        value = files[names[key]].get_slice(key)
        if list(value.get_shape()) != list(parameter.shape):
            raise UserError(f"{folder}: {key} has shape {value.get_shape()}, the config says "
                            f"{list(parameter.shape)}")
        local, offset = world.piece(parameter.data)
        with torch.no_grad():
            local.copy_(value[offset:offset + local.shape[0]])


def weight_files(folder: Path) -> list[str]:
    """The names of a model folder's weight files, as transformers looks for them: one, or what an
    index names. UserError if one of them is missing."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        names = ["model.safetensors"]
    else:
        try:
            where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(where.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is not an index of weights: {error!r}") from None
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index} names {name!r}, outside the folder")
        if not (folder / name).is_file():
            pickled = any(folder.glob("pytorch_model*.bin"))
            raise UserError(f"{folder}: {name} is missing; " + (
                "pickled weights (pytorch_model.bin) are not read, convert them to safetensors"
                if pickled else "copy the folder again, whole"))
    return names


def write_weights(model: LLaMA, folder: Path, dtype: torch.dtype, limit: int) -> None:
    """model.safetensors, or shards of at most `limit` bytes and their index; a tied matrix once."""
    weights, filled = dict(model.named_parameters()), 0
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, weight in weights.items():
        filled += weight.numel() * dtype.itemsize
        if filled > limit and shards[-1]:
            shards.append({})
            filled = weight.numel() * dtype.itemsize
        shards[-1][name] = weight.data
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        one_of = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        where |= dict.fromkeys(shard, f"model{one_of}.safetensors")
        save_file({name: weight.to(dtype).contiguous() for name, weight in shard.items()},
                  folder / f"model{one_of}.safetensors", {"format": "pt"})
        shutil.copymode(folder / "config.json", folder / f"model{one_of}.safetensors")
    if len(shards) > 1:
        total = sum(weight.numel() for weight in weights.values()) * dtype.itemsize
        write_json(folder / "model.safetensors.index.json",
                              {"metadata": {"total_size": total}, "weight_map": where})
