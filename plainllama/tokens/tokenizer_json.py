"""What a tokenizer.json says without any library: boundaries, byte counts, Hugging Face files."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plainllama.settings import UserError
from plainllama.tokens import vocabulary
from plainllama.tokens.vocabulary import BYTES

# Begin and end of a document, by the names that LLaMA-family tokenizers give them.
PAIRS = (("<s>", "</s>"), ("<|begin_of_text|>", "<|end_of_text|>"), ("<bos>", "<eos>"),
         ("<|startoftext|>", "<|endoftext|>"), ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"))


# ---- the JSON alone: boundaries, byte counts, Hugging Face files

class ByteInfo(NamedTuple):
    """Per id: utf-8 bytes it decodes to, and how many of them are lost at a document's start."""

    lengths: np.ndarray
    prefix: np.ndarray
    bos_id: int


def sha256_of(path: Path | str) -> str:
    """Hash of a tokenizer.json as we use it, completed with what a document needs."""
    return vocabulary.sha256(_read(path)[1])


def boundaries(spec_json: dict) -> tuple[str | None, str | None]:
    """(begin, end) token of a parsed tokenizer.json: two, one in front, or none."""
    special = [entry["content"] for entry in spec_json.get("added_tokens") or []
               if entry.get("special")]
    for pair in PAIRS:
        if set(pair) <= set(special):
            return pair
    if "<|endoftext|>" in special:
        return "<|endoftext|>", None
    named = [token for token in special if not re.search("unk|pad|mask", token.lower())]
    return (named[0], None) if len(named) == 1 else (None, None)


def byte_info(path: Path | str) -> ByteInfo:
    """What decoded_bytes needs of a tokenizer.json (a file or its folder)."""
    spec, _ = _read(path)
    entries, bos = _entries(spec), boundaries(spec)[0]
    decoders = {step["type"]: step for step in _steps(spec["decoder"])}
    first = decoders.get("Metaspace", {}).get("prepend_scheme", "always") != "never"
    lengths, prefix = np.zeros((2, max(entries) + 1), np.int32)
    for i, (piece, special) in entries.items():
        if special:
            continue
        if "ByteLevel" in decoders:
            lengths[i] = len(piece if BYTES.keys() >= set(piece) else piece.encode())
        elif "ByteFallback" in decoders and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            lengths[i] = 1
        else:
            lengths[i] = len(piece.replace("▁", " ").encode())
            if "Metaspace" in decoders:  # this decoder drops every space of the first token
                prefix[i] = piece.count("▁") * first
            elif "Strip" in decoders:
                prefix[i] = piece.startswith("▁")
    return ByteInfo(lengths, prefix, next(i for i, (piece, _) in entries.items() if piece == bos))


def decoded_bytes(ids: np.ndarray, info: ByteInfo) -> int:
    """Utf-8 bytes that the targets ids[..., 1:] decode to; ids[..., :1] is only context."""
    target = ids[..., 1:]
    found = info.lengths[target] - info.prefix[target] * (ids[..., :-1] == info.bos_id)
    return int(found.sum(dtype=np.int64))


def write_hf_files(tokenizer_json: Path | str, folder: Path | str, block_size: int) -> None:
    """Write tokenizer.json and tokenizer_config.json for transformers' AutoTokenizer.

    PreTrainedTokenizerFast, since other classes rebuild the pipeline and ignore parts of the file.
    """
    spec, data = _read(tokenizer_json)
    bos, eos = boundaries(spec)
    special = [piece for piece, special in _entries(spec).values() if special]
    model = spec["model"]
    unknown = model.get("unk_token")
    if model["type"] == "Unigram" and model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    padding = next((piece for piece in special if "pad" in piece.lower()), None)
    tokens = {"bos_token": bos, "eos_token": eos or bos, "unk_token": unknown, "pad_token": padding}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
        **{name: token for name, token in tokens.items() if token is not None},
    }
    (Path(folder) / "tokenizer.json").write_bytes(data)
    (Path(folder) / "tokenizer_config.json").write_text(
        json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(path: Path | str) -> tuple[dict, bytes]:
    """(parsed, bytes) of a tokenizer.json, completed with what a document needs."""
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"no tokenizer at {file}; give a tokenizer.json or a folder that holds one")
    data = file.read_bytes()
    try:
        spec = json.loads(data)
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); give a tokenizer.json") from None
    return (spec, _dump(spec)) if _complete(spec, str(file)) else (spec, data)


def _complete(spec: dict, where: str) -> bool:
    """Check a parsed tokenizer.json and add what is missing; True if anything was changed."""
    model = spec.get("model") if isinstance(spec, dict) else None
    if not isinstance(model, dict) or not model.get("vocab"):
        raise UserError(f"{where} holds no tokenizer model; give the tokenizer.json of a BPE or "
                        "unigram tokenizer")
    model.setdefault("type", "BPE" if "merges" in model else "Unigram")
    known = {"ByteLevel", "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"}
    decoders = {step["type"] for step in _steps(spec.get("decoder"))}
    if model["type"] not in ("BPE", "Unigram") or not decoders or decoders - known:
        raise UserError(f"{where}: a {model['type']} tokenizer with decoder "
                        f"{' '.join(sorted(decoders)) or 'none'} is not supported; take a BPE or "
                        "unigram tokenizer of the LLaMA or GPT family")
    small = {"vocab": 0, "merges": 0}  # these stay as they are
    before = json.dumps({**spec, "model": model | small})
    spec |= {"truncation": None, "padding": None}
    if model["type"] == "BPE":
        model["dropout"] = None  # it would make encoding random
    if boundaries(spec)[0] is None:
        size = max(_entries(spec)) + 1
        spec["added_tokens"] = [*(spec.get("added_tokens") or []), vocabulary.special("<s>", size),
                                vocabulary.special("</s>", size + 1)]
    bos = boundaries(spec)[0]
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    spec["post_processor"] = {
        "type": "TemplateProcessing", "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "tokens": [bos], "ids": [
            i for i, (piece, _) in _entries(spec).items() if piece == bos]}}}
    if model["type"] == "Unigram":
        _guard(spec)
    return json.dumps({**spec, "model": model | small}) != before


def _guard(spec: dict) -> None:
    """Cut text that spells a special or byte piece: a unigram model would find it in its list."""
    names = [re.escape(piece[0]) + f"(?={re.escape(piece[1:])})"
             for piece, special in _entries(spec).values() if special]
    guard = {"type": "Split", "pattern": {"Regex": "|".join([*names, "<(?=0x[0-9A-F]{2}>)"])},
             "behavior": "MergedWithPrevious", "invert": False}
    steps = _steps(spec.get("pre_tokenizer"))
    if guard not in steps:
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, guard]}


def _steps(part: dict | None) -> list[dict]:
    """The steps of a decoder, pre-tokenizer or post-processor, its sequences opened."""
    if not part:
        return []
    if part.get("type") != "Sequence":
        return [part]
    inner = next(value for value in part.values() if isinstance(value, list))
    return [step for item in inner for step in _steps(item)]


def _entries(spec: dict) -> dict[int, tuple[str, bool]]:
    """id -> (piece, is it special) of every id; added tokens override the model's."""
    vocab = spec["model"]["vocab"]
    pieces = vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    return {i: (piece, False) for piece, i in pieces.items()} | {
        e["id"]: (e["content"], bool(e.get("special"))) for e in spec.get("added_tokens") or []}


def _dump(spec: dict) -> bytes:
    return (json.dumps(spec, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
