"""A model as one .gguf file, which llama.cpp opens and what is built on it: Ollama, LM Studio.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. llama.cpp knows tokenizers
by kind and name, not by what they do: one that it would apply otherwise is refused here. It rotates
neighbours where RoPE of Hugging Face's checkpoints rotates halves, so the rows of two matrices
change places.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model import LLaMA, ModelConfig, rope_frequencies
from plainllama.settings import Sampling, UserError, install
from plainllama.tokens.chat import TEMPLATE
from plainllama.tokens.templates import answer_ends
from plainllama.tokens.tokenizer_json import boundaries, list_entries, list_steps
from plainllama.tokens.vocabulary import BYTE_LEVEL, BYTES, SPACES, SPLIT, cut_like, replace

# --type -> name of the matrices' type in ggml, of the whole file
TYPES = {"f32": ("F32", "ALL_F32"), "f16": ("F16", "MOSTLY_F16"), "bf16": ("BF16", "MOSTLY_BF16"),
         "q8_0": ("Q8_0", "MOSTLY_Q8_0")}
LARGEST = 65504.0  # of f16, in which q8_0 has its scales
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
         "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# how words of a byte-level vocabulary are cut, llama.cpp's name for it, whether it takes a word
# that is a piece without asking its merges
CUTS = ((BYTE_LEVEL, "gpt-2", False), (cut_like(SPLIT), "qwen35", False),
        (cut_like(LLAMA3_SPLIT), "llama-bpe", True))
PREPEND = {"type": "Prepend", "prepend": "▁"}
GO_TEMPLATE = Path(__file__).parent.with_name("tokens") / "chat_template.gotmpl"


class Vocabulary(NamedTuple):
    """A tokenizer in the terms of GGUF; lists are by id."""

    model: str  # gpt2: a byte-level BPE; llama: sentencepiece's
    pre: str  # how words are cut, by llama.cpp's name
    pieces: list[str]
    types: list[int]
    scores: list[float]  # llama: pieces with a higher one are made first
    merges: list[str]  # gpt2
    adds_space: bool  # llama: in front of a text


# ---- the tokenizer

def vocabulary_of(spec: dict, rows: int) -> Vocabulary:
    """Put a parsed tokenizer.json in the terms of GGUF, filled up with unused entries to as many
    `rows` as the embedding has. UserError if llama.cpp would give other ids."""
    entries = list_entries(spec)
    if any(not entry["special"] for entry in spec["added_tokens"]):
        refuse("it takes added tokens out of texts that are not special")
    decoders = {step["type"] for step in list_steps(spec["decoder"])}
    if spec["model"]["type"] != "BPE":
        refuse(f"it is a {spec['model']['type']} model")
    made = byte_level(spec) if "ByteLevel" in decoders else sentencepiece(spec)
    for i in range(rows):
        piece, is_special = entries.get(i, (f"<|unused{i}|>", False))
        made.pieces.append(piece)
        made.types.append(type_of(piece, is_special, i in entries, spec))
    if made.model == "llama":
        rank = {piece: n for n, piece in enumerate(dict.fromkeys(map("".join, pairs_of(spec))))}
        made.scores.extend(-float(rank.get(piece, 0)) for piece in made.pieces)
    return made


def refuse(reason: str) -> None:
    """Raise the UserError of a tokenizer that llama.cpp does not have."""
    raise UserError(f"llama.cpp would read text otherwise than this model's tokenizer: {reason}; "
                    "export a folder (--to=DIR), which transformers and vLLM open, or train with "
                    "mistral, gpt2, bytes or a new bpe:N")


def pairs_of(spec: dict) -> list[tuple[str, str]]:
    """List the merges of a BPE, first and second piece of each."""
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair
             for pair in spec["model"]["merges"]]
    return [(left, right) for left, right in pairs]


def type_of(piece: str, is_special: bool, is_there: bool, spec: dict) -> int:
    """Say what an entry is, in ggml's numbers: control tokens have no text, unused ones no id."""
    from gguf import TokenType

    model = spec["model"]
    if not is_there:
        return TokenType.UNUSED
    if piece == model.get("unk_token"):
        return TokenType.UNKNOWN
    if is_special:
        return TokenType.CONTROL
    byte = model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", piece)
    return TokenType.BYTE if byte else TokenType.NORMAL


def byte_level(spec: dict) -> Vocabulary:
    """Put a byte-level BPE in GGUF's terms, its lists of entries still empty."""
    model, words = spec["model"], spec.get("pre_tokenizer")
    added = {entry["content"] for entry in spec["added_tokens"]}
    ignores = bool(model.get("ignore_merges"))
    names = [name for cut, name, ignoring in CUTS
             if bare(words) == bare(cut) and ignores == ignoring]
    if not names:
        old = any("{1,3}" in str(step.get("pattern")) for step in list_steps(words))
        older = "bpe:N of an older plainllama, or another program's, " if old else ""
        refuse(f"{older}cuts words in a way that llama.cpp does not have")
    if spec.get("normalizer") or model.get("byte_fallback"):
        refuse("it changes texts before it reads them")
    pieces = model["vocab"].keys() - added
    if not set("".join(pieces)) <= BYTES.keys() <= pieces:
        refuse("its pieces are not bytes")
    merges = [" ".join(pair) for pair in pairs_of(spec)]
    # llama.cpp wants one merge at least: of two bytes that no text has
    return Vocabulary("gpt2", names[0], [], [], [], merges or ["ÿ ÿ"], False)


def bare(words: dict | None) -> list[dict]:
    """List the steps of a pre-tokenizer without what does not change ids."""
    return [{name: value for name, value in step.items() if name != "trim_offsets"}
            for step in list_steps(words)]


def sentencepiece(spec: dict) -> Vocabulary:
    """Put a sentencepiece BPE in GGUF's terms, its lists of entries still empty. llama.cpp joins
    any neighbours that make a piece, that of the best score first: the merges must say the same."""
    model, vocab = spec["model"], spec["model"]["vocab"]
    steps = list_steps(spec.get("normalizer"))
    if steps not in ([PREPEND, replace(" ", "▁")], [replace(" ", "▁")]):
        refuse("it changes texts before it reads them")
    if spec.get("pre_tokenizer") not in (None, SPACES) or model.get("ignore_merges"):
        refuse("it cuts words in a way that llama.cpp does not have")
    if not model.get("byte_fallback") or {f"<0x{i:02X}>" for i in range(256)} - vocab.keys():
        refuse("it has no bytes for characters without a piece")
    pairs = pairs_of(spec)
    joined = [left + right for left, right in pairs]
    grouped = [piece for n, piece in enumerate(joined) if n == 0 or joined[n - 1] != piece]
    possible = {(piece[:k], piece[k:]) for piece in vocab for k in range(1, len(piece))
                if piece[:k] in vocab and piece[k:] in vocab}
    if len(set(grouped)) < len(grouped) or possible != set(pairs):
        refuse("its merges have an order that no scores of pieces give")
    return Vocabulary("llama", "default", [], [], [], [], PREPEND in steps)


# ---- the weights

def gguf_name(name: str) -> str:
    """Name a parameter as llama.cpp does."""
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if block:
        return f"blk.{block[1]}.{NAMES[block[2]]}.weight"
    return f"{NAMES[name.removesuffix('.weight')]}.weight"


def halves_to_neighbours(weight: Tensor, heads: int) -> Tensor:
    """Put the rows (heads D, C) of a query or key matrix in llama.cpp's order: channels that RoPE
    turns together are D/2 rows apart here, side by side there."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def neighbours_to_halves(weight: Tensor, heads: int) -> Tensor:
    """Undo halves_to_neighbours()."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def heads_of(name: str, config: ModelConfig) -> int:
    """Count the heads whose rows change places in a parameter, 0 if none do."""
    return {"q_proj": config.n_head, "k_proj": config.kv_heads}.get(name.split(".")[-2], 0)


def type_for(weight: Tensor, kind: str):
    """Choose the type of ggml that a weight gets in a file of --type `kind`: a gain is fp32, and
    rows that q8_0's blocks of 32 do not divide are f16."""
    from gguf import GGMLQuantizationType

    if weight.dim() == 1:
        return GGMLQuantizationType.F32
    if kind == "q8_0" and weight.shape[1] % 32:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[TYPES[kind][0]]


def tensors_of(model: LLaMA) -> dict[str, tuple[str, Tensor]]:
    """List a model's weights by llama.cpp's names, with ours; tied ones once."""
    found = {gguf_name(name): (name, weight.data) for name, weight in model.named_parameters()}
    config = model.config
    if config.rope_scaling not in ("none", "linear"):  # theta^(-2i/D) is divided by these
        plain = 1.0 / config.rope_theta ** (
            torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
        found["rope_freqs.weight"] = "", plain / rope_frequencies(config)
    return found


# ---- the file

def write_gguf(path: Path, model: LLaMA, spec: dict, template: str, kind: str, name: str,
               license_: str = "") -> None:
    """Write a model and its parsed tokenizer.json into `path`, its matrices as --type `kind`, one
    after the other: no second copy of the model is in memory. UserError if the tokenizer is none of
    llama.cpp's, or weights are too large for the type."""
    import gguf
    import numpy as np

    tensors = tensors_of(model)
    if kind in ("f16", "q8_0"):
        for ours, weight in tensors.values():
            if weight.dim() > 1 and weight.abs().max() > LARGEST:
                raise UserError(f"{ours} has values beyond {LARGEST:.0f}, the largest of "
                                f"--type={kind}; say --type=bf16")
    writer = gguf.GGUFWriter(path, "llama")
    describe(writer, model.config, kind, name, license_)
    write_tokenizer(writer, spec, model.config.vocab_size, template)
    for theirs, (_, weight) in tensors.items():
        dtype = type_for(weight, kind)
        block, size = gguf.GGML_QUANT_SIZES[dtype]
        writer.add_tensor_info(theirs, list(weight.shape), np.dtype(np.float32),
                               weight.numel() // block * size, dtype)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for ours, weight in tensors.values():
            heads = heads_of(ours, model.config) if ours else 0
            rows = halves_to_neighbours(weight, heads) if heads else weight
            writer.write_tensor_data(gguf.quants.quantize(rows.float().numpy(),
                                                          type_for(weight, kind)))
    finally:
        writer.close()


def describe(writer, config: ModelConfig, kind: str, name: str, license_: str) -> None:
    """Write the architecture."""
    import gguf

    writer.add_name(name)
    if license_:
        writer.add_license(license_)
    writer.add_file_type(gguf.LlamaFileType[TYPES[kind][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_factor)


def write_tokenizer(writer, spec: dict, rows: int, template: str) -> None:
    """Write the tokenizer, what begins and ends a text and an answer, and the template."""
    words = vocabulary_of(spec, rows)
    ids = {entry["content"]: entry["id"] for entry in spec["added_tokens"]}
    begin, end = boundaries(spec)
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.pieces)
    writer.add_token_types(words.types)
    if words.model == "llama":
        writer.add_token_scores(words.scores)
        writer.add_add_space_prefix(words.adds_space)
        writer.add_unk_token_id(spec["model"]["vocab"][spec["model"]["unk_token"]])
    else:
        writer.add_token_merges(words.merges)
    writer.add_bos_token_id(ids[begin])
    writer.add_eos_token_id(ids[end or begin])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    for name in sorted(answer_ends(template, spec) - {end or begin})[:1]:
        writer.add_eot_token_id(ids[name])
    if template:
        writer.add_chat_template(template)


def compare(path: Path, model: LLaMA, kind: str) -> str:
    """Read a written file again and compare its weights with the model's; what differs, or ''. Of
    q8_0 a number may be half a step from the model's: 1/127 of the largest of its 32."""
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    tensors = tensors_of(model)
    if stored.keys() != tensors.keys():
        return f"{path} holds {len(stored)} weights, the model has {len(tensors)}"
    for theirs, (ours, weight) in tensors.items():
        found = stored[theirs]
        read = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type).copy())
        heads = heads_of(ours, model.config) if ours else 0
        read = neighbours_to_halves(read, heads) if heads else read.view(weight.shape)
        if found.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            blocks = weight.unflatten(1, (-1, 32))
            step = blocks.abs().amax(-1, keepdim=True) / 127
            same = ((read.view(blocks.shape) - blocks).abs() <= 0.6 * step + 1e-7).all()
        else:
            dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(
                found.tensor_type.name, torch.float32)
            same = torch.equal(read, weight.to(dtype).float())
        if not same:
            return f"{theirs} is not what was written of {ours or 'the rotary frequencies'}"
    return ""


# ---- Ollama

def modelfile(file: str, config: ModelConfig, template: str) -> str:
    """Write what `ollama create` takes beside the .gguf `file`: the context, sampling as sample.py
    has it, and how dialogs are written, which Ollama does not read from the file but for templates
    of a list. Of a template of others nothing is written."""
    sampling = Sampling()
    lines = [f"# ollama create NAME -f {Path(file).stem}.Modelfile", f"FROM ./{file}"]
    if template in ("", TEMPLATE):
        written = GO_TEMPLATE.read_text("utf-8").strip() if template else "{{ .Prompt }}"
        lines.append(f'TEMPLATE """{written}"""')
    else:
        lines.append("# Ollama takes the template from the file if it is one that it knows.")
    lines += [f"PARAMETER num_ctx {config.block_size}",
              f"PARAMETER temperature {sampling.temperature}",
              f"PARAMETER top_k {sampling.top_k}", f"PARAMETER top_p {sampling.top_p}",
              f"PARAMETER min_p {sampling.min_p}",
              f"PARAMETER repeat_penalty {sampling.repetition_penalty}"]
    if template == TEMPLATE:
        lines.append('PARAMETER stop "<|end|>"')
    return "\n".join(lines) + "\n"


def check_installed() -> None:
    """Raise a UserError that names the extra if the library is not there."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("a .gguf needs the package gguf: " + install("gguf")) from None
