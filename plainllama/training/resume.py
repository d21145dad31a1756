"""Where a run stands: the checkpoint to go on from, what is refused then, and any step's text."""

import contextlib
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from model import ModelConfig
from plainllama.command import CommandLine
from plainllama.files import lock_run, newest_run, read_rows, steps_of, write_status
from plainllama.parallel import World
from plainllama.settings import (
    DIALOGS,
    Settings,
    UserError,
    check_keys,
    deciding,
    settle_documents,
)
from plainllama.text.sources import described
from plainllama.tokens import tokenizer
from plainllama.tokens.rows import CONTEXT, PAD, Rows, hash_of_data, ids_of, training_rows
from plainllama.tokens.templates import chat_of, find_template
from plainllama.tokens.tokenizer_json import sha256_of
from plainllama.training import optim
from plainllama.training.engine import architecture, outline
from plainllama.training.objectives import OBJECTIVES, Objective
from plainllama.weights import checkpoint, expansion, peft
from plainllama.weights.huggingface import (
    GROWN,
    fitting,
    other_keys,
    read_config,
    refuse_rounding,
)

# On resume these must be as they were, or the run would be another one ...
FIXED = deciding("identity", "fixed")
# ... and these change the course of the optimisation, so they need --extend.
COURSE = deciding("course")
# What a run takes over from the model that it begins with, where its config says nothing.
INHERITED = ("n_layer", "n_head", "n_kv_head", "d_model", "d_ff", "block_size", "rope_theta",
             "rope_scaling", "rope_factor", "rope_original", "norm_eps", "tie_embeddings",
             *GROWN[:3])


# ---- may this run go on, or start from there?

@dataclass
class Start:
    """Where a run begins now: from `source` or, if that is None, from first weights. `state`: the
    source's state.json if the run goes on, else {}. `lock`: rank 0 holds the run's folder by it
    until its process ends."""

    source: Path | None
    state: dict
    lock: IO | None = None

    @property
    def step(self) -> int:
        """The step that the run has reached."""
        return self.state.get("step", 0)


def name_data_set(command: CommandLine) -> str:
    """Let a mixture be validated on its first set, where no other is named that is here; what to
    say of that, or ''."""
    config = command.config
    here = (Path("data") / config.dataset / "manifest.json").exists()
    if here or not config.mixture or "dataset" in command.overrides:
        return ""
    config.dataset = next(iter(config.mixture))  # type: ignore[call-overload]
    return (f"validated on data/{config.dataset}, the first set of the mixture; --dataset=NAME "
            "names another")


def settle(command: CommandLine, manifest: dict) -> list[str]:
    """Give the config what its data set and the model of init_from have settled, and what follows
    from that; returns lines that say so. UserError where the config or the command line asks for
    something else."""
    config = command.config
    said = [keep_recipe(command, manifest)]
    settle_documents(config)
    if config.init_from and not model_folder(config):
        checkpoint.find_checkpoint(config.init_from)  # which says what is not there
    theirs, inherited = inherit(command)
    said += inherited
    pairs, known = config.documents == "preference", [name for name in OBJECTIVES if name != "next"]
    if pairs != (config.objective != "next"):
        raise UserError(f"objective={config.objective} is not for documents={config.documents}; "
                        + (f"say --objective={' or '.join(known)}" if pairs else
                           f"{' and '.join(known)} want a set of documents=preference"))
    if OBJECTIVES[config.objective].reference and not config.init_from:
        raise UserError(f"objective={config.objective} compares with the model that it begins "
                        "with; say --init_from=MODEL")
    if (config.lora_r or config.expand_blocks) and not config.init_from:
        what = "lora_r" if config.lora_r else "expand"
        raise UserError(f"{what} trains beside a model that is there; say --init_from=MODEL")
    config.vocab_size, grown = vocabulary(config, manifest, theirs)
    said.append(grown)
    if theirs and not steps_of(Path(config.out_dir)):
        refuse_other_model(Path(config.init_from), theirs, architecture(config), manifest)
    check_keys(config)
    if config.epochs:
        if "max_steps" in command.overrides:
            raise UserError("max_steps has no effect beside epochs; say one of them")
        rows = training_rows(Path("data") / config.dataset, manifest, config)
        batch = config.global_batch_tokens // config.block_size
        steps = max(1, math.ceil(config.epochs * rows.windows / batch - 1e-9))
        given = "max_steps" in command.given
        instead = f", in place of max_steps {config.max_steps}" if given else ""
        said.append(f"epochs {config.epochs:g}: {steps} steps of {batch} rows{instead}")
        config.max_steps = steps
    return [remark for remark in (*said, optim.fit_warmup(config)) if remark]


def changed(command: CommandLine) -> str:
    """Say what the command line changes of the config file that it names, '' for nothing."""
    said = ", ".join(f"{name} {command.overrides[name]!s:.80} (there: {was!s:.80})"
                     for name, was in command.instead.items())
    return f"changed of {command.config_file}: {said}" if said else ""


def keep_recipe(command: CommandLine, manifest: dict) -> str:
    """Give the config the recipe of its data set, which prepare.py has settled; returns what to say
    of a config file that has another one, or ''. UserError if the command line asks for another."""
    config, settled = command.config, asdict(Settings()) | manifest["recipe"]
    refused, unused = [name for name in deciding("prepare") if name in command.overrides], []
    for name in deciding("recipe"):
        ours, theirs = getattr(config, name), settled[name]
        setattr(config, name, theirs)
        same = described(ours) == described(theirs) if name == "sources" else ours == theirs
        if not same and name in command.overrides:
            refused.append(name)
        elif not same and ours != getattr(Settings, name):
            unused.append(f"{name}={theirs!r:.80}")
    if refused:
        raise UserError(f"{', '.join(refused)}: data/{config.dataset} is prepared, and otherwise; "
                        "give these options to prepare.py, with a new --dataset")
    said = f"data/{config.dataset} was prepared with {', '.join(unused)}: what "
    return f"{said}{command.config_file} says of that has no effect" if unused else ""


def model_folder(config: Settings) -> Path | None:
    """Find a model of the architecture that a run goes on with: its own newest checkpoint, or what
    init_from names; None if it begins anew, or what is named is none."""
    if not config.init_from:
        return None
    for own in steps_of(Path(config.out_dir)):
        with contextlib.suppress(UserError):  # a damaged one: the step before is taken
            peft.whole_config(own)
            return own
    source = Path(config.init_from)
    run = source if (source / "checkpoints").is_dir() else newest_run(source)
    steps = [source, *(steps_of(run) if run else ())]
    return next((folder for folder in steps if peft.is_adapter(folder)
                 or (folder / "config.json").is_file()), None)


def inherit(command: CommandLine, names=INHERITED) -> tuple[ModelConfig | None, list[str]]:
    """Give the config the architecture of the model that it goes on from, if there is one, where
    nobody set another; returns that model's, and a line for each value that is not a default."""
    source = model_folder(command.config)
    if not source:
        return None, []
    theirs, said = peft.whole_config(source), []
    for name in names:
        ours, given = getattr(command.config, name), getattr(theirs, name)
        if name in GROWN and not theirs.expand_blocks:
            continue  # it may grow now
        if name == "n_kv_head" and given == theirs.n_head:
            given = 0
        if ours != given and name in command.given:
            said.append(f"{name} = {ours} (as you say; {source} has {given})")
        elif ours != given:
            setattr(command.config, name, given)
            said.append(f"{name} = {given} (inherited from {source})")
    return theirs, said


def vocabulary(config: Settings, manifest: dict, theirs: ModelConfig | None) -> tuple[int, str]:
    """Choose the entries of the embedding: the config's if it says, else those of the model that it
    goes on from or, if these are more, of the tokenizer. Also what to say of new ones."""
    entries = manifest["tokenizer"]["vocab_size"]
    if 0 < config.vocab_size < entries:
        raise UserError(f"vocab_size {config.vocab_size} is smaller than the {entries} entries of "
                        "the tokenizer; leave it 0")
    there = theirs.vocab_size if theirs else 0
    wanted = config.vocab_size or max(entries, there)
    grown = f"the vocabulary grows from {there} to {wanted} entries" if 0 < there < wanted else ""
    return wanted, grown


def begin(run: Path, config: Settings, manifest: dict, data_hash: str, extend: bool,
          world: World) -> Start:
    """Decide, on rank 0 for all, where a run begins, and take its folder. UserError where it may
    not. A run that is complete is left as it is."""
    start = Start(None, {})

    def find() -> tuple[Path | None, dict]:
        if run.is_dir():
            start.lock = lock_run(run)
        return starting_point(run, config, data_hash, extend)

    def claim() -> None:
        if not start.lock:
            run.mkdir(parents=True, exist_ok=True)
            start.lock = lock_run(run)
            if steps_of(run):
                raise UserError(f"another process has begun to train in {run}; start again")
        (run / "checkpoints").mkdir(exist_ok=True)  # where it cannot be, that is known now
        if start.state:
            checkpoint.set_aside(run, start.step)
        write_status(run, "running", start.step)  # not `stopped` any more

    start.source, start.state = world.decide(find)
    if not start.source and config.init_from:
        start.source = source_of(config, manifest, world)
    if start.step < config.max_steps:
        world.decide(claim)
    return start


def source_of(config: Settings, manifest: dict, world: World) -> Path:
    """Choose the checkpoint that init_from means, on rank 0 for all. UserError if it does not fit
    the config or the data set."""
    source = world.decide(lambda: checkpoint.find_checkpoint(config.init_from))
    world.decide(lambda: refuse_other_tokenizer(source, manifest))
    world.decide(lambda: refuse_other_part(source, config))
    return source


def refuse_other_part(source: Path, config: Settings) -> None:
    """Refuse an adapter that is another than the config's, new tokens that could not learn, and to
    round what is frozen where a checkpoint holds it too."""
    model = outline(config, source if peft.is_adapter(source) or config.expand_blocks else None)[0]
    ends = model.model.embed_tokens.weight, model.lm_head.weight
    entries, home = peft.whole_config(source).vocab_size, peft.tokenizer_folder(source)
    grows = expansion.first_new(home, entries, config)
    if grows and config.train_only and not all(end.requires_grad for end in ends):
        names = "embed_tokens" if config.tie_embeddings else "embed_tokens,lm_head"
        raise UserError(f"train_only freezes the rows of new tokens; add {names} to it, or train "
                        "an adapter (lora_r)")
    if not peft.is_adapter(source):
        fitting(source, model, bool(grows), not read_config(source).expand_blocks)
    if config.frozen_dtype == "bf16" and not config.lora_r:
        refuse_rounding(source, model)


def starting_point(run: Path, config: Settings, data_hash: str,
                   extend: bool) -> tuple[Path | None, dict]:
    """Find the checkpoint to go on from and its state; (None, {}) for a fresh start."""
    there = steps_of(run)
    if config.resume == "never" and there:
        raise UserError(f"resume=never, but {run} is at {there[0].name}; choose another out_dir")
    good = checkpoint.newest_good(run) if there else None
    if good:
        state = checkpoint.read_state(good)
        refuse_other_run(state, config, data_hash, extend, good)
        return good, state
    if config.resume == "must":
        raise UserError(f"resume=must, but {run} holds no whole checkpoint")
    if there:
        raise UserError(f"no checkpoint in {run} can be used ({there[0].name}: "
                        f"{checkpoint.damage(there[0])}); choose another out_dir")
    return None, {}


def refuse_other_run(state: dict, config: Settings, data_hash: str, extend: bool,
                     source: Path) -> None:
    """Refuse to go on from `source` with a config that is not that run's."""
    old = asdict(Settings(packing="concat")) | state["config"]  # a run may be older than a key
    remedies = dict.fromkeys(FIXED, "choose another out_dir")
    if not extend:
        remedies |= dict.fromkeys(COURSE, "say --extend to accept it")
    for name, remedy in remedies.items():
        from_data = name == "vocab_size" and not config.vocab_size  # whose hash is compared below
        moved = name == "init_from" and peft.lost_its_base(source)  # nor can that be another
        if old[name] != getattr(config, name) and not (from_data or moved):
            raise UserError(f"{source} was trained with {name}={old[name]}, now it is "
                            f"{getattr(config, name)}; say --{name}={old[name]}, or {remedy}")
    if state["data_hash"] != data_hash:
        raise UserError(f"{source} was trained on another data/{config.dataset}; choose another "
                        "out_dir")


def refuse_other_model(source: Path, theirs: ModelConfig, config: ModelConfig,
                       manifest: dict) -> None:
    """Refuse to start from a model that computes something else. Context and RoPE scaling may
    differ: that is how context grows; so may the vocabulary of a data set that added the roles of a
    dialog to the model's tokenizer."""
    if theirs.vocab_size < config.vocab_size and manifest["tokenizer"].get("base"):
        theirs = replace(theirs, vocab_size=config.vocab_size)
    if keys := other_keys(theirs, config):
        raise UserError(f"init_from: {source} is another model than the config's; to go on from it "
                        f"say {keys}")


def refuse_other_tokenizer(source: Path, manifest: dict) -> None:
    """Refuse to start from a model whose token ids mean something else than the data set's."""
    known = {manifest["tokenizer"]["sha256"], manifest["tokenizer"].get("base")}
    home = peft.tokenizer_folder(source)
    for path in (home / "tokenizer.json", home / "tokenizer.model"):
        if path.is_file():  # the second is converted first, as prepare.py does
            sha256 = (sha256_of(path) if path.suffix == ".json" else
                      tokenizer.make_tokenizer(str(path)).sha256)
            if sha256 not in known:
                raise UserError(f"{path} is not the tokenizer of the data set; prepare one with "
                                f"--tokenizer={path}")
            return


def kept_template(source: Path | None, config: Settings) -> str:
    """Give the template of dialogs that a model has which goes on with text, '' if there is
    none."""
    if source and config.documents not in DIALOGS:
        with contextlib.suppress(UserError):  # there is none
            return find_template(peft.tokenizer_folder(source))
    return ""


def replay(config: Settings, manifest: dict, step: int) -> int:
    """Print the text of the rows that made step `step` of metrics.jsonl, of dialogs with [[...]]
    around what is learned; the exit code."""
    run, data = Path(config.out_dir), Path("data") / config.dataset
    if there := steps_of(run):
        state, data_hash = checkpoint.read_state(there[0]), hash_of_data(data, config)
        refuse_other_run(state, config, data_hash, True, there[0])
    # the batch may have changed at a resume: steps and rows as the run has written them down
    known = {0: 0} | {row["step"]: row["rows"]
                      for row in read_rows(run / "metrics.jsonl", tolerant=True) if "rows" in row}
    if step > (end := max(config.max_steps, *known)):
        raise UserError(f"--replay={step}: the run ends at step {end}")
    last = max(s for s in known if s < step)
    batch = config.global_batch_tokens // config.block_size
    if step <= max(known):
        following = min(s for s in known if s >= step)
        batch = (known[following] - known[last]) // (following - last)
    rows, words = training_rows(data, manifest, config), tokenizer.Tokenizer.load(data)
    chat = chat_of(words) if config.documents in DIALOGS else None
    first = known[last] + (step - 1 - last) * batch
    windows = rows.window_of(first, batch)
    print(f"step {step}: rows {first} to {first + batch - 1}")
    for row, flagged in enumerate(rows.read_windows(windows)):
        ids, learned = ids_of(flagged), flagged[flagged != PAD] < CONTEXT
        print(f"--- row {first + row}: window {windows[row]} of the train split")
        print(chat.show(ids, learned, colour=False) if chat else words.decode(ids))
    return 0


# ---- which rows a step sees

class Course:
    """The rows and targets of every step since this start: functions of the step.

    `state`: that of the checkpoint the run goes on from; the batch may have changed there.
    """

    def __init__(self, rows: Rows, batch_rows: int, objective: Objective, state: dict):
        self.rows, self.batch_rows, self.objective = rows, batch_rows, objective
        self.first_step, self.first_row = state.get("step", 0), state.get("rows", 0)
        # of what is counted: (so many rows have, so many)
        self.counted = dict.fromkeys(("targets", "tokens"), (0, 0))

    def rows_at(self, step: int) -> int:
        """Count the rows that the run has consumed when `step` updates are done."""
        return self.first_row + (step - self.first_step) * self.batch_rows

    def windows(self, step: int) -> np.ndarray:
        """Name the windows (batch_rows,) of the update that follows `step`."""
        return self.rows.window_of(self.rows_at(step), self.batch_rows)

    def targets_of(self, step: int) -> int:
        """Count what the loss of the update that follows `step` is divided by, over all ranks."""
        return self.objective.count(self.rows, self.rows_at(step), self.batch_rows)

    def read_in(self, step: int) -> int:
        """Count the tokens that the update which follows `step` reads, over all ranks."""
        return self.rows.tokens(self.rows_at(step), self.batch_rows)

    def tokens_at(self, step: int) -> int:
        """Count the targets that the run has trained on when `step` updates are done."""
        return self.added_up("targets", step)

    def read_at(self, step: int) -> int:
        """Count the tokens that the run has read when `step` updates are done."""
        return self.added_up("tokens", step)

    def added_up(self, what: str, step: int) -> int:
        """Count `what` of the rows before those of the update that follows `step`."""
        end = self.rows_at(step)
        rows, total = self.counted[what] if self.counted[what][0] <= end else (0, 0)
        total += getattr(self.rows, what)(rows, end - rows)
        self.counted[what] = end, total
        return total
