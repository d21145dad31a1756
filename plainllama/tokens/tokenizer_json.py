"""What a tokenizer.json says without any library: boundaries, byte counts, Hugging Face files."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plainllama.files import read_json, sha256_bytes, write_text
from plainllama.settings import UserError
from plainllama.tokens.vocabulary import BYTES, special, split

# Begin and end of a document, by the names that LLaMA-family tokenizers give them.
PAIRS = (("<s>", "</s>"), ("<|begin_of_text|>", "<|end_of_text|>"), ("<bos>", "<eos>"),
         ("<|startoftext|>", "<|endoftext|>"), ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
         ("<|endoftext|>", None))  # GPT-2's one token is in front
# Roles of messages and their end, in tokenizers of dialogs: chat.py gives them their meaning.
CHAT = {"<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"}
TEMPLATE_FILE = "chat_template.jinja"  # beside a tokenizer.json: how dialogs are written
DECODERS = {"ByteLevel", "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"}  # that we know


# ---- reading

def read_spec(path: Path | str) -> tuple[dict, bytes]:
    """Read a tokenizer.json, or a folder's, completed with what a document needs.

    Returns it parsed and as bytes: the file's own, if nothing was missing.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"no tokenizer at {file}; give a tokenizer.json or a folder that holds one")
    try:
        return complete(read_json(file), str(file), file.read_bytes())
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError) as error:
        raise UserError(f"{file} is not what a tokenizer.json is ({error!r}); take another, or "
                        "save it again with the tokenizers library") from None


def sha256_of(path: Path | str) -> str:
    """Hash a tokenizer.json as we use it, completed with what a document needs."""
    return sha256_bytes(read_spec(path)[1])


def list_entries(spec: dict) -> dict[int, tuple[str, bool]]:
    """Map every id to (piece, is it special); added tokens override the model's."""
    vocab = spec["model"]["vocab"]
    pieces = vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    return {i: (piece, False) for piece, i in pieces.items()} | {
        e["id"]: (e["content"], bool(e.get("special"))) for e in spec.get("added_tokens") or []}


def list_steps(part: dict | None) -> list[dict]:
    """List the steps of a decoder, normalizer or pre-tokenizer, its sequences opened."""
    if not part:
        return []
    if part.get("type") != "Sequence":
        return [part]
    inner = next(value for value in part.values() if isinstance(value, list))
    return [step for item in inner for step in list_steps(item)]


def boundaries(spec: dict) -> tuple[str | None, str | None]:
    """Find the (begin, end) token of a parsed tokenizer.json: two, one in front, or none."""
    names = [entry["content"] for entry in spec.get("added_tokens") or []
             if entry.get("special") and entry["content"] not in CHAT]
    for begin, end in PAIRS:
        if begin in names and end in (*names, None):
            return begin, end
    named = [name for name in names if not re.search("unk|pad|mask", name.lower())]
    return (named[0], None) if len(named) == 1 else (None, None)


# ---- completing

def complete(spec: dict, where: str, data: bytes = b"") -> tuple[dict, bytes]:
    """Add to a parsed tokenizer.json what a document needs.

    Returns it and its bytes: `data`, those it was read from, if nothing was missing. UserError,
    which names `where`, if it is not a tokenizer that we can use.
    """
    model = spec.get("model")
    if not isinstance(model, dict) or not model.get("vocab"):
        raise UserError(f"{where} holds no tokenizer model; give a BPE or unigram tokenizer")
    model.setdefault("type", "BPE" if "merges" in model else "Unigram")
    decoders = {step["type"] for step in list_steps(spec.get("decoder"))}
    if model["type"] not in ("BPE", "Unigram") or not decoders or decoders - DECODERS:
        raise UserError(f"{where}: a {model['type']} tokenizer with decoders {sorted(decoders)} is "
                        "not supported; take a BPE or unigram of the LLaMA or GPT family")
    whole = model.get("byte_fallback") or model.get("unk_id") is not None
    if model["type"] == "Unigram" and not whole:
        raise UserError(f"{where}: its Unigram model has no unk_id, and so no id for a character "
                        "that its vocabulary lacks; give it one")
    for entry in spec.get("added_tokens") or []:
        if type(entry.get("id")) is not int or not isinstance(entry.get("content"), str):
            raise UserError(f"{where}: {entry} in its added_tokens has no id or no content")
    before = outline(spec)
    spec |= {"truncation": None, "padding": None}
    if model["type"] == "BPE":
        model["dropout"] = None  # it would make encoding random
    if boundaries(spec)[0] is None:
        size = max(list_entries(spec)) + 1
        spec["added_tokens"] = [*(spec.get("added_tokens") or []), special("<s>", size),
                                special("</s>", size + 1)]
    bos = boundaries(spec)[0]
    ids = [i for i, (piece, _) in list_entries(spec).items() if piece == bos]
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    spec["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": pair,
                              "special_tokens": {bos: {"id": bos, "tokens": [bos], "ids": ids}}}
    if model["type"] == "Unigram":
        guard_special_pieces(spec)
    if not data or outline(spec) != before:
        data = (json.dumps(spec, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
    return spec, data


def outline(spec: dict) -> str:
    """Write all of a parsed tokenizer.json but its long lists, which stay as they are."""
    return json.dumps({**spec, "model": spec["model"] | {"vocab": 0, "merges": 0}})


def guard_special_pieces(spec: dict) -> None:
    """Cut text that spells a special or byte piece: a unigram model would find it in its list."""
    names = [re.escape(piece[0]) + f"(?={re.escape(piece[1:])})"
             for piece, is_special in list_entries(spec).values() if is_special]
    guard = split("|".join([*names, "<(?=0x[0-9A-F]{2}>)"]), "MergedWithPrevious")
    steps = list_steps(spec.get("pre_tokenizer"))
    if guard not in steps:
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, guard]}


def never_first(spec: dict) -> dict:
    """Copy a parsed tokenizer.json for texts that are never the first: a Metaspace that puts a
    space in front of that alone puts none, and the decoder takes none away."""
    words, decoder = json.loads(json.dumps([spec.get("pre_tokenizer"), spec["decoder"]]))
    first = [step for step in list_steps(words) if step.get("prepend_scheme") == "first"]
    if not first:
        return spec
    for step in [*first, *list_steps(decoder)]:
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
        elif step["type"] == "Strip":
            step["start"] = 0
    return spec | {"pre_tokenizer": words, "decoder": decoder}


# ---- bytes of tokens

class ByteInfo(NamedTuple):
    """Per id: utf-8 bytes it decodes to, and how many of them are lost at a document's start."""

    lengths: np.ndarray
    prefix: np.ndarray
    bos_id: int


def byte_info(path: Path | str) -> ByteInfo:
    """Read what decoded_bytes needs of a tokenizer.json (a file or its folder)."""
    spec, _ = read_spec(path)
    entries, bos = list_entries(spec), boundaries(spec)[0]
    decoders = {step["type"]: step for step in list_steps(spec["decoder"])}
    lengths, prefix = np.zeros((2, max(entries) + 1), np.int32)
    ordinary = {i: piece for i, (piece, is_special) in entries.items() if not is_special}
    for i, piece in ordinary.items():
        if "ByteLevel" in decoders:
            lengths[i] = len(piece if BYTES.keys() >= set(piece) else piece.encode())
        elif "ByteFallback" in decoders and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            lengths[i] = 1
        else:
            lengths[i] = len(piece.replace("▁", " ").encode())
            prefix[i] = spaces_dropped(piece, decoders)
    return ByteInfo(lengths, prefix, next(i for i, (piece, _) in entries.items() if piece == bos))


def spaces_dropped(piece: str, decoders: dict[str, dict]) -> int:
    """Count the spaces that `decoders` (by type) drop of `piece` where it begins a document."""
    if "Metaspace" in decoders:  # it drops every space of the first token
        kept = decoders["Metaspace"].get("prepend_scheme", "always") == "never"
        return 0 if kept else piece.count("▁")
    return int("Strip" in decoders and piece.startswith("▁"))


def decoded_bytes(ids: np.ndarray, info: ByteInfo) -> int:
    """Count the utf-8 bytes that the targets ids[..., 1:] decode to; ids[..., :1] is context."""
    target = ids[..., 1:]
    begins = ids[..., :-1] == info.bos_id  # a document begins with the target
    sizes = info.lengths[target] - np.where(begins, info.prefix[target], 0)
    return int(sizes.sum(dtype=np.int64))


# ---- for transformers

def named_tokens(spec: dict) -> dict[str, str]:
    """Name the special tokens of a parsed tokenizer.json as transformers does: bos_token, ..."""
    bos, eos = boundaries(spec)
    names = [piece for piece, is_special in list_entries(spec).values() if is_special]
    model = spec["model"]
    unknown = model.get("unk_token")
    if model["type"] == "Unigram" and model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    padding = next((name for name in names if "pad" in name.lower()), None)
    tokens = {"bos_token": bos, "eos_token": eos or bos, "unk_token": unknown, "pad_token": padding}
    return {name: token for name, token in tokens.items() if token is not None}


def read_template(folder: Path) -> str:
    """Read the template of dialogs that lies in a folder, '' without one."""
    file = folder / TEMPLATE_FILE
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def write_hf_files(tokenizer_json: Path | str, folder: Path | str, block_size: int,
                   template: str = "") -> None:
    """Write tokenizer.json, tokenizer_config.json and the template of dialogs, the one that lies
    beside `tokenizer_json` or else `template`, for transformers' AutoTokenizer.

    PreTrainedTokenizerFast, since other classes rebuild the pipeline and ignore parts of the file.
    """
    spec, data = read_spec(tokenizer_json)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
              "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    config |= named_tokens(spec)
    if template := read_template(Path(tokenizer_json).parent) or template:
        config["chat_template"] = template  # some readers look into one place, some into the other
        write_text(Path(folder) / TEMPLATE_FILE, template)
    (Path(folder) / "tokenizer.json").write_bytes(data)
    write_text(Path(folder) / "tokenizer_config.json",
               json.dumps(config, indent=1, ensure_ascii=False) + "\n")
