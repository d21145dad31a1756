"""What came of a run, in numbers and in sentences."""

from datetime import timedelta
from html import escape

from plainllama.report.blocks import Block, paragraph, short, table_block
from plainllama.report.curves import curve, hours_by_step, reader
from plainllama.report.runs import RunFolder, is_number
from plainllama.settings import DIALOGS

LATEST = 0.2  # of a run, over which it is said whether it still learns
NOTABLE = 0.005  # of a loss: smaller changes are called none


def kind_of(run: RunFolder) -> str:
    """Name the kind of documents that a run learned."""
    return run.info["config"].get("documents", "text")


def seconds_of(run: RunFolder) -> float:
    """Count the seconds of training, without evaluation, saving and pauses."""
    return hours_by_step(run)[-1][1] * 3600


def outcome(run: RunFolder) -> str:
    """Say in sentences what came of a run."""
    state, device = run.status.get("state", "begun"), run.info["device"]
    tokens, loss, bits = (short(run.last(name)) for name in ("tokens", "val_loss", "val_bpb"))
    size, steps = run.info["parameters"].get("total"), run.info["config"].get("max_steps")
    unit = "learned tokens" if kind_of(run) in DIALOGS else "tokens"
    broken = " and ".join(name for name in ("loss", "val_loss") if run.ends_broken(name))
    time = timedelta(seconds=round(seconds_of(run)))
    said = (f"{run.name}: a LLaMA of {short(size)} parameters, {state} at step {run.last('step')} "
            f"of {steps}, after {tokens} {unit} and {time} of "
            f"training on {device.get('count')} x {device.get('name')}: validation loss {loss} ")
    preferred = run.last("val_rewards/accuracies")
    said += (f"nats per pair, chosen preferred in {preferred or 0:.1%}."
             if kind_of(run) == "preference" else f"nats per token, {bits} bits per byte.")
    saved = run.status.get("step")
    if is_number(saved) and saved != run.last("step"):
        said += f" Its newest checkpoint is of step {saved}." if saved else " Nothing is saved yet."
    older = f" Its newest {broken} is not finite; what is said here is older."
    return said + older if broken else said


def figures(run: RunFolder) -> dict[str, str]:
    """Give a run's most telling numbers, with their units; those that it has."""
    steps, per = run.info["config"].get("max_steps"), "token"
    learned = "learned " if kind_of(run) in DIALOGS else ""
    if kind_of(run) == "preference":
        per = "pair"
    found: dict[str, str] = {}
    if is_number(loss := run.last("val_loss")):
        found[f"validation loss, nats per {per}"] = f"{loss:.4f}"
    if is_number(bits := run.last("val_bpb")):
        found["validation, bits per byte"] = f"{bits:.4f}"
    if is_number(preferred := run.last("val_rewards/accuracies")):
        found["chosen preferred, validation"] = f"{preferred:.1%}"
    if is_number(margin := run.last("val_rewards/margins")):
        found["reward margin, validation"] = f"{margin:.3f}"
    found["step"] = f"{run.last('step')} of {steps}"
    if run.last("tokens"):
        found[f"{learned}tokens"] = short(run.last("tokens"))
    if seconds := seconds_of(run):
        found["time of training"] = str(timedelta(seconds=round(seconds)))
    if speed := run.last("tokens_per_second"):
        found["tokens per second"] = short(speed)
    if mfu := run.last("mfu"):
        found["MFU"] = f"{mfu:.1%}"
    return found


def tiles(run: RunFolder) -> Block:
    """Show a run's figures, the most telling ones first."""
    found = figures(run)
    html = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>"
                   for name, value in found.items())
    twin = table_block([*found], [[*found.values()]])
    return Block(f'<div class="tiles">{html}</div>', twin.markdown)


def verdict(run: RunFolder) -> list[Block]:
    """Say what came of a run, and what its curves tell of it."""
    told = [outcome(run), " ".join(filter(None, (
        trend(run), gap(run), left_out(run), beside_counting(run))))]
    return [tiles(run), *(paragraph(text) for text in told if text)]


def trend(run: RunFolder) -> str:
    """Say whether the validation loss still falls, or has risen since its lowest value."""
    points = curve([run], "val_loss")
    if len(points) < 3:
        return ""
    end, lowest = points[-1], min(points, key=lambda point: point.mean)
    if end.mean > lowest.mean * (1 + NOTABLE):
        return (f"The validation loss was lowest at step {lowest.step}, {lowest.mean:.4f}, and has "
                f"risen by {end.mean - lowest.mean:.4f} since.")
    begin = end.step - LATEST * (end.step - points[0].step)
    before = reader([(point.step, point.mean) for point in points])(begin)
    if before > end.mean * (1 + NOTABLE):
        return (f"The validation loss still fell at the end: by {before - end.mean:.4f} over the "
                f"last {LATEST:.0%} of the steps.")
    return f"The validation loss hardly changed over the last {LATEST:.0%} of the steps."


def gap(run: RunFolder) -> str:
    """Say how far the training loss lies below the validation loss, at the end."""
    points, last = curve([run], "loss"), run.last("val_loss")
    near = [point.mean for point in points[-max(len(points) // 20, 5):]]
    if last is None or len(points) < 20 or kind_of(run) == "preference":
        return ""
    mean = sum(near) / len(near)
    side = "below" if mean < last else "above"
    return (f"Over the last {len(near)} logged steps the training loss lies {abs(last - mean):.4f} "
            f"{side} that.")


def left_out(run: RunFolder) -> str:
    """Say how many updates were not made because they were not finite."""
    skipped = run.last("skipped")
    return f"{skipped} updates were not made: they were not finite." if skipped else ""


def beside_counting(run: RunFolder) -> str:
    """Say how the newest scores compare with those of the 5-gram model, where it was counted."""
    for scores in run.evals[::-1]:
        bits, counted = scores.get("val_bpb"), scores.get("baselines", {}).get("5-gram_bpb")
        if is_number(bits) and is_number(counted):
            side = "fewer" if bits < counted else "more"
            return (f"At step {scores.get('step')} it needs {abs(counted - bits) / counted:.1%} "
                    f"{side} bits than a 5-gram model that counted the same text.")
    return ""
