"""Every config key with its type, range and reason, and the rules between keys."""

import difflib
import re
from dataclasses import dataclass, field, fields
from functools import partial


class UserError(Exception):
    """What the user can mend: one line that says what was found and what to do. Exit code 2."""


class Incomplete(Exception):
    """Work of which a part failed again and again, and the rest is kept: one line. Exit code 1."""


def key(default, why: str, choices: tuple = (), low=None, high=None, decides: str = "",
        bare: str = ""):
    """A key or flag: its default, a line for --help, what values it may take, what a key of
    Settings decides, and what a flag means without a value ('': it needs one)."""
    meta = {"why": why, "choices": choices, "low": low, "high": high, "decides": decides,
            "bare": bare}
    return field(default=default, metadata=meta)


# What a key decides, said once, where it is declared; deciding() gives the lists of it.
# recipe: the bytes of the data set, and so prepare.py's alone
# prepare: how prepare.py works, but not what it makes
# identity: which run it is: of one recipe there are several
# fixed: what the run computes: it must stay on resume
# course: the course of optimisation: resume changes it if told to
# measure: what is measured of a run, but not what it learns
# free: where, how fast and how often: not what is learned
recipe, prepare, identity, fixed, course, measure, free = (partial(key, decides=what) for what in (
    "recipe", "prepare", "identity", "fixed", "course", "measure", "free"))


@dataclass
class Settings:
    """Every key of a run. The defaults are those of config/llama100m.py."""

    # data
    dataset: str = identity("openwebtext", "folder under data/ that prepare.py writes")
    sources: object = recipe("hf:ashaba1in/small_openwebtext", "text: a path, glob, -, "
                             "hf:NAME[@REV][:split], embedded, a dict, or a list of these")
    documents: str = recipe("text", "what a record of the sources is",
                            ("text", "chat", "preference", "table"))
    tokenizer: str = recipe(
        "mistral", "mistral, gpt2, bytes, bpe:4096 (trained here), a .model, a tokenizer.json")
    val_fraction: float = recipe(
        0.005, "share of documents held out: enough for some hundred windows of block_size, such "
        "as 0.005 of a GB of text, 0.02 of 20 MB, 0.1 of 1 MB", low=1e-9, high=0.5)
    min_chars: int = recipe(0, "documents with fewer characters are dropped", low=0)
    max_chars: int = recipe(0, "documents with more characters are dropped (0: no bound)", low=0)
    dedup: str = recipe("none", "which repeated documents are dropped", ("none", "exact", "near"))
    strict: bool = recipe(False, "stop at a record that cannot be read, which else is only counted")
    workers: int = prepare(0, "processes of prepare.py (0: one per core)", low=0)
    train_on: str = recipe("auto", "what is learned of a dialog: all answers, the last one, or all "
                           "that is said (auto: assistant, of pairs last)",
                           ("auto", "assistant", "last", "all"))
    too_long: str = recipe("cut", "a dialog longer than block_size loses its last turns (a pair "
                           "the first of its prompt), or is dropped", ("cut", "drop"))
    chat_template: str = recipe("own", "model: the Jinja template beside the tokenizer",
                                ("own", "model"))
    max_dropped: float = prepare(0.2, "share of a source's dialogs or transactions that may be "
                                 "dropped", (), 0, 1)
    packing: str = fixed("auto", "a row holds text without end, tokens of one document, or several "
                         "whole documents (auto: concat for text, else fit)",
                         ("auto", "concat", "doc", "fit"))
    mixture: object = fixed(None, "train on several data sets: {'a': 0.7, 'b': 0.3}")
    # model
    n_layer: int = fixed(16, "transformer blocks", low=1)
    n_head: int = fixed(12, "query heads", low=1)
    n_kv_head: int = fixed(0, "key and value heads (0: as many as query heads)", low=0)
    d_model: int = fixed(768, "width of the residual stream", low=2)
    d_ff: int = fixed(2048, "hidden width of the SwiGLU", low=1)
    vocab_size: int = fixed(0, "entries of the embedding (0: from the data set)", low=0)
    block_size: int = fixed(1024, "context length in tokens", low=1)
    rope_theta: float = fixed(10000.0, "base of the rotary frequencies", low=1)
    rope_scaling: str = fixed("none", "stretch of the positions", ("none", "linear", "llama3"))
    rope_factor: float = fixed(1.0, "by how much the context is stretched", low=1)
    rope_original: int = fixed(0, "context length before the stretch (llama3)", low=0)
    norm_eps: float = fixed(1e-5, "epsilon of RMSNorm", low=0)
    tie_embeddings: bool = fixed(False, "one matrix for embedding and output")
    attention: str = free("sdpa", "back end", ("sdpa", "varlen", "xformers", "reference"))
    doc_mask: bool = fixed(False, "tokens see their own document only")
    # what learns
    train_only: str = fixed("", "freeze all but these: first:N, last:N, every:N (blocks), parts of "
                            "parameters' names")
    lora_r: int = fixed(0, "rank of adapters beside the frozen model (0: none)", low=0)
    lora_alpha: float = fixed(16.0, "an adapter counts alpha / r times", low=1e-3)
    lora_dropout: float = fixed(0.0, "share of an adapter's inputs that is dropped", (), 0, 0.99)
    lora_targets: str = fixed("all", "matrices with adapters: all, of q,k,v,o,gate,up,down, or "
                              "parts of names")
    frozen_dtype: str = fixed("fp32", "how frozen matrices are held",
                              ("fp32", "bf16", "int8", "nf4"))
    expand: str = fixed("none", "freeze the model and learn copies of some blocks: beside them "
                        "(concat), behind them (stack), or in turns (hybrid: stack first)",
                        ("none", "concat", "stack", "hybrid"))
    expand_blocks: int = fixed(0, "how many blocks have a copy: every n_layer // expand_blocks-th",
                               low=0)
    expand_merge: str = fixed("lerp", "how much a copy beside its block counts: one number a block "
                              "(lerp), or one a token (dlerp)", ("lerp", "dlerp"))
    divergence: str = fixed("mse", "how far a copy's states are from its block's",
                            ("mse", "cosine"))
    divergence_weight: float = fixed(0.0, "times the divergence is added to the loss", low=0)
    # training
    objective: str = fixed("next", "next token, or preferences: dpo, orpo",
                           ("next", "dpo", "orpo"))
    preference_beta: float = fixed(0.1, "weight of the preference (dpo, orpo)", (), 1e-6, 100)
    nll_weight: float = fixed(0.0, "dpo: weight of the chosen answer's loss a token, added", low=0)
    out_dir: str = free("", "the run's folder (default: out/<config file's name>)")
    init_from: str = fixed("", "start from the weights of this checkpoint, run or model folder")
    resume: str = free("auto", "go on from out_dir's newest checkpoint", ("auto", "must", "never"))
    seed: int = identity(1337, "seeds weights and data order", low=0)
    max_steps: int = course(2300, "optimizer updates", low=1)
    epochs: float = course(0.0, "passes over the rows, in place of max_steps (0: that)", low=0)
    global_batch_tokens: int = course(524288, "tokens per optimizer update, of all devices", low=1)
    micro_batch: int = free(0, "rows per forward pass and device (0: as many as fit)", low=0)
    optimizer: str = fixed("adamw", "muon is for the blocks' matrices only", ("adamw", "muon"))
    learning_rate: float = course(
        6e-4, "peak learning rate: adamw 1e-3 to 2e-3 for a few M parameters, 6e-4 for 100 M, 3e-4 "
        "for 1 B; muon 2e-3 to 8e-3 for a few M; with lora_r 2e-4", low=0)
    min_lr: float = course(6e-5, "learning rate at the end", low=0)
    schedule: str = course(
        "cosine", "how the rate falls to min_lr: along the whole run, or (wsd) in its last fifth "
        "alone: until then the run can be made longer as if it had been planned so (--extend)",
        ("cosine", "wsd", "linear"))
    warmup_steps: int = course(200, "steps of linear warm-up", low=0)
    weight_decay: float = course(0.1, "decoupled decay, on matrices only", low=0)
    beta1: float = course(0.9, "AdamW first moment (Muon's momentum is 0.95)", low=0, high=1)
    beta2: float = course(0.95, "AdamW second moment", low=0, high=1)
    grad_clip: float = course(1.0, "largest gradient norm (0: no clipping)", low=0)
    device: str = free("auto", "where to train", ("auto", "cpu", "cuda", "mps"))
    dtype: str = free("auto", "of matmuls; weights stay fp32", ("auto", "fp32", "bf16", "fp16"))
    compile: str = free("auto", "torch.compile", ("auto", "true", "false"))
    parallel: str = free("auto", "how ranks share the work", ("auto", "ddp", "fsdp", "hsdp"))
    offload: bool = free(False, "fsdp, hsdp: weights, gradients and moments lie in host memory")
    activation_checkpointing: bool = free(False, "compute blocks twice to save memory")
    overfit_rows: int = fixed(0, "train on this many rows again and again (a sanity check)", low=0)
    max_minutes: float = free(0.0, "stop with a checkpoint after this long (0: never)", low=0)
    deterministic: bool = free(False, "the same bits on 1, 2, 4, 8, ... ranks (one process, ddp)")
    # cadence
    log_interval: int = free(10, "steps between lines of metrics", low=1)
    logger: str = free("none", "also log to this service, over the network", ("none", "wandb"))
    eval_interval: int = free(100, "steps between evaluations", low=1)
    eval_tokens: int = measure(1048576, "validation tokens per evaluation", low=1)
    eval_sets: object = measure(None, "more validation sets: {'old': 'data/a', 'new': 'data/b'}")
    eval_generate: str = free("", "a file of prompts and references: an evaluation answers the "
                              "first 16 and scores the answers")
    sample_tokens: int = free(64, "tokens of the text that an evaluation samples (0: none)", low=0)
    sample_prompt: str = free("", "what that text begins with")
    save_interval: int = free(100, "steps between checkpoints", low=1)
    keep_last: int = free(2, "newest checkpoints that are kept, beside the best", low=1)
    keep_every: int = free(0, "also keep every checkpoint at a multiple of this step", low=0)


@dataclass
class Sampling:
    """How a token is drawn: in this order, which is that of transformers."""

    repetition_penalty: float = key(1.0, "above 1: the said is less likely again", (), 1e-3, 1e3)
    temperature: float = key(1.0, "divides the logits; 0: always the likeliest token", low=0)
    top_k: int = key(0, "draw from the k likeliest tokens (0: from all)", low=0)
    top_p: float = key(1.0, "draw from the likeliest tokens of this joint probability", (), 0, 1)
    min_p: float = key(0.0, "drop tokens below this share of the likeliest's probability", (), 0, 1)


IDLE = {"text": ("train_on", "too_long", "chat_template", "max_dropped"),  # keys without effect,
        "chat": ("min_chars", "max_chars"),  # by the kind of documents
        "preference": ("min_chars", "max_chars"),
        "table": ("train_on", "too_long", "chat_template", "min_chars", "max_chars", "dedup")}
DIALOGS = ("chat", "preference")  # the kinds of documents whose tokens are not all learned


# Keys and flags of all commands that name a file or a folder: ~ at its beginning is the home.
PATHS = ("tokenizer", "out_dir", "init_from", "verify", "inspect", "ckpt", "prompts", "out", "all",
         "shots", "text", "data", "include_path", "irt_file", "irt", "to", "compare",
         "save_reference", "tools", "base", "generate", "eval_generate", "template",
         "labels", "test_ids")


def deciding(*what: str) -> tuple[str, ...]:
    """Name the keys of Settings that decide one of these: 'recipe', 'fixed', ..."""
    return tuple(item.name for item in fields(Settings) if item.metadata["decides"] in what)


def all_named(sets) -> bool:
    """Whether this is {'NAME': 'FOLDER', ...}, and not empty."""
    return isinstance(sets, dict) and bool(sets) and all(
        isinstance(name, str) and isinstance(folder, str)
        and re.fullmatch(r"[\w-]+", name, re.ASCII) for name, folder in sets.items())


def ceil_div(a, b):
    """Divide and round up: whole numbers, or arrays of them."""
    return -(-a // b)


def install(extra: str) -> str:
    """The command that installs an extra of pyproject.toml."""
    return "python -m pip install -c constraints.txt -e " + (f"'.[{extra}]'" if extra else ".")


def nearest(name: str, known, least: float = 0.5) -> str:
    """'; did you mean X?' for a misspelt name, or ''; `least`: the likeness that X must have."""
    known = sorted(known, key=len)
    longer = [other for other in known if other.endswith(f"_{name}")]  # beta: preference_beta
    longer += [other for other in known if f"_{name}_" in f"_{other}_"]  # vocab: vocab_size
    close = longer or difflib.get_close_matches(name, known, 1, least)
    return f"; did you mean {close[0]}?" if close else ""


def settle_documents(config: Settings) -> None:
    """Give `train_on`, `packing` and `doc_mask` what the kind of documents asks for."""
    if config.train_on == "auto":
        config.train_on = "last" if config.documents == "preference" else "assistant"
    if config.packing == "auto":
        config.packing = "concat" if config.documents == "text" else "fit"
    elif config.documents != "text" and config.packing != "fit":
        raise UserError(f"packing={config.packing} is for text; documents={config.documents} are "
                        "packed with fit")
    config.doc_mask = config.doc_mask or config.packing == "fit"


def check_keys(config: Settings, shape: bool = True) -> None:
    """Refuse, before anything slow starts, keys that do not fit together; `shape`: also those
    that a model which is there may settle."""
    c, scaled, llama3 = config, config.rope_scaling != "none", config.rope_scaling == "llama3"
    batch, block = c.global_batch_tokens, c.block_size
    for whole, part, message in (
            (c.d_model, c.n_head, "d_model {} does not divide into n_head {} heads"),
            (c.d_model // c.n_head, 2, "the head width d_model / n_head = {} must be even (RoPE)"),
            (c.n_head, c.n_kv_head or c.n_head, "n_head {} is not a multiple of n_kv_head {}"),
            (batch, block, "global_batch_tokens {} is not a multiple of block_size {}; try "
                           f"{max(1, batch // block) * block}")):
        if shape and whole % part:
            raise UserError(message.format(whole, part))
    lora = [name for name in ("lora_alpha", "lora_dropout", "lora_targets")
            if getattr(c, name) != getattr(Settings, name)]
    mixed = c.mixture if isinstance(c.mixture, dict) else {}
    beside = c.expand in ("concat", "hybrid")
    for_copies = [name for name in ("expand_merge", "divergence", "divergence_weight")
                  if getattr(c, name) != getattr(Settings, name)]
    sound = mixed and all(isinstance(name, str) and type(weight) in (int, float)
                          and 0 < weight < float("inf") for name, weight in mixed.items())
    for wrong, message in (
            (c.min_lr > c.learning_rate, f"min_lr {c.min_lr} is above learning_rate"),
            (max(c.beta1, c.beta2) >= 1, "beta1 and beta2 must both be below 1"),
            (scaled and c.rope_factor == 1, f"{c.rope_scaling} needs rope_factor above 1"),
            (not scaled and c.rope_factor > 1,
             f"rope_factor {c.rope_factor} has no effect without rope_scaling"),
            (llama3 and not c.rope_original, "rope_scaling=llama3 needs rope_original"),
            (not llama3 and c.rope_original,
             f"rope_original {c.rope_original} has no effect without rope_scaling=llama3"),
            (lora and not c.lora_r, f"{', '.join(lora)}: no effect without lora_r"),
            (c.lora_r and c.train_only, "lora_r trains adapters alone; train_only has no place"),
            (c.lora_r and c.optimizer == "muon", "muon makes whole matrices orthogonal, which "
             "adapters' thin ones are not for; with lora_r say --optimizer=adamw"),
            (shape and c.frozen_dtype != "fp32"
             and not (c.lora_r or c.train_only or c.expand_blocks),
             f"frozen_dtype={c.frozen_dtype} has no effect where nothing is frozen; say lora_r, "
             "train_only or expand"),
            (c.frozen_dtype in ("int8", "nf4") and not c.lora_r,
             f"frozen_dtype={c.frozen_dtype} is for lora_r: any other checkpoint is a whole model, "
             "whose frozen matrices must come back as they were"),
            (c.frozen_dtype in ("int8", "nf4") and c.parallel in ("fsdp", "hsdp"),
             f"frozen_dtype={c.frozen_dtype} is not sharded; say --parallel=ddp, or bf16"),
            (shape and (c.expand != "none") != (c.expand_blocks > 0),
             f"expand={c.expand} with expand_blocks={c.expand_blocks}: say both, or neither"),
            (shape and c.expand == "hybrid" and c.expand_blocks < 2, "expand=hybrid takes turns "
             "between stack and concat; say --expand_blocks=2 or more, or one of them"),
            (shape and c.expand_blocks > c.n_layer,
             f"expand_blocks {c.expand_blocks} is above the {c.n_layer} blocks of the model"),
            (shape and for_copies and not beside, f"{', '.join(for_copies)}: no effect without "
             "expand=concat or hybrid"),
            (c.expand != "none" and (c.lora_r or c.train_only), f"expand={c.expand} learns copies "
             f"of blocks alone; {'lora_r' if c.lora_r else 'train_only'} has no place (of a model "
             "that has copies make a plain one first: export.py, --merge_back)"),
            (c.offload and c.parallel not in ("fsdp", "hsdp"),
             f"offload has no effect on parallel={c.parallel}; say --parallel=fsdp, which one GPU "
             "can do too: torchrun --nproc_per_node=1"),
            (c.offload and c.optimizer == "muon", "muon would make matrices orthogonal on the CPU; "
             "with offload say --optimizer=adamw"),
            (c.lora_dropout and c.deterministic, "lora_dropout draws other numbers on other ranks; "
             "it does not go with deterministic"),
            (c.sample_prompt and not c.sample_tokens,
             "sample_prompt has no effect without sample_tokens"),
            (c.mixture is not None and not sound,
             f"mixture {c.mixture!r} is not {{'NAME': weight above 0, ...}} of data sets"),
            (c.eval_sets is not None and not all_named(c.eval_sets),
             f"eval_sets {c.eval_sets!r} is not {{'NAME': 'data/SET', ...}}, names of letters, "
             "digits, - and _"),
            (c.preference_beta != 0.1 and c.objective == "next",
             f"preference_beta={c.preference_beta} has no effect on objective=next"),
            (c.nll_weight and c.objective != "dpo",
             f"nll_weight={c.nll_weight} is for objective=dpo"),
            (c.lora_dropout and c.objective == "dpo", "lora_dropout would make model and reference "
             "of dpo two draws; say 0"),
            (mixed and c.objective != "next", "a mixture is for objective=next; give several "
             "sources to one set of pairs"),
            (mixed and c.overfit_rows, "overfit_rows takes the rows of one data set, no mixture"),
            (mixed and c.epochs, "epochs are of one data set; with a mixture say max_steps"),
            *((c.documents == other
               and getattr(c, name) not in (getattr(Settings, name), "assistant"),
               f"{name}={getattr(c, name)} has no effect on documents={other}")
              for other, names in IDLE.items() for name in names)):
        if wrong:
            raise UserError(message)
