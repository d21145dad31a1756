"""Memory and time of the loss, all logits at once and in chunks: python runs/loss.py

4,608 tokens of width 256, 32,000 entries: 562 MiB of fp32 logits. Each way in a process of its own,
whose most resident memory above that before the loss is what it took; torch's own
F.linear_cross_entropy (2.13) stands beside it.
"""
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

import model
from plainllama.training import log

TOKENS, WIDTH, VOCAB = 4608, 256, 32000


def at_once(x, w, y):
    """As where logits are small."""
    return F.cross_entropy(F.linear(x, w), y, reduction="sum")


def in_chunks(x, w, y):
    """As where they are not."""
    return model.ChunkedLoss.apply(x, w, w, y, model.chunk_rows(len(w), model.LOGITS_BYTES), True)


def by_torch(x, w, y):
    """torch's."""
    return F.linear_cross_entropy(x, w, y, reduction="sum",
                                  options=torch.nn.LinearCrossEntropyOptions())


WAYS = {"all at once": at_once, "in chunks": in_chunks, "F.linear_cross_entropy": by_torch}


def one(way: str) -> None:
    """Print the milliseconds and the bytes of forward and backward."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, WIDTH, generator=generator, requires_grad=True)
    w = (torch.randn(VOCAB, WIDTH, generator=generator) * 0.05).requires_grad_()
    y = torch.randint(VOCAB, (TOKENS,), generator=generator)
    torch.autograd.grad(WAYS[way](x[:8], w, y[:8]), (x, w))  # warm
    before, began = log.peak_memory(torch.device("cpu")), time.perf_counter()
    loss = WAYS[way](x, w, y)
    gradient = torch.autograd.grad(loss, (x, w))[1]
    print(1e3 * (time.perf_counter() - began), log.peak_memory(torch.device("cpu")) - before,
          loss.item(), gradient.norm().item())


def main() -> None:
    """Take turns."""
    found: dict[str, list[list[float]]] = {}
    for _ in range(3):
        for way in WAYS if hasattr(F, "linear_cross_entropy") else list(WAYS)[:2]:
            said = subprocess.run([sys.executable, __file__, way], capture_output=True, text=True,
                                  check=True).stdout
            found.setdefault(way, []).append([float(word) for word in said.split()])
    middle = {way: [median(column) for column in zip(*each, strict=True)]
              for way, each in found.items()}
    for way, (ms, size, loss, norm) in middle.items():
        print(f"{way}: {ms:,.0f} ms, {size / 2**20:,.0f} MiB, loss {loss:.2f}, gradient {norm:.5g}")
    ours = middle["in chunks"]
    for way in [way for way in middle if way != "in chunks"]:
        other = middle[way]
        print(f"| loss of 4,608 x 32,000, MiB: in chunks beside {way} | {ours[1] / 2**20:,.0f} | "
              f"{other[1] / 2**20:,.0f} | {ours[1] / other[1]:.2f} |")
        print(f"| the same, ms | {ours[0]:,.0f} | {other[0]:,.0f} | {ours[0] / other[0]:.2f} |")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one(sys.argv[1])
    else:
        main()
