"""The pairs of `embedded:preference`, made by a seed from what embedded:chat talks of: a short and
polite answer is chosen, one that rambles, is rude or is wrong is rejected.
"""

import json
from collections.abc import Iterator
from typing import IO

from plainllama.text.embedded_chat import SEED, WORDS, Maker

COUNT = 2000
RAMBLING = ["Well, that is a question. ", "Let me think about it for a while. ",
            "Many ask me that. ", "There is a lot to say here. "]
RUDE = ["Is that all? ", "You should know that. ", "Not again. "]
POLITE = ["Gladly: ", "With pleasure: ", "Of course: "]


class PairMaker(Maker):
    """Draws pairs of one split, "train" or "held_out"."""

    def pair(self) -> dict:
        """Make a question about a word, a good answer and a worse one."""
        draw = self.draw
        word, way = self.name().lower(), draw.choice(list(WORDS))
        right = WORDS[way](word)
        good = f"{draw.choice(POLITE)}{right}."
        kind = draw.choice(["rambling", "rude", "wrong"])
        if kind == "rambling":
            bad = f"{''.join(draw.sample(RAMBLING, 2))}{right}, as I said."
        elif kind == "rude":
            bad = f"{draw.choice(RUDE)}{right}."
        else:
            bad = f"{draw.choice(POLITE)}{self.name().lower()}."
        return {"prompt": self.asking(way.format(word)), "chosen": good, "rejected": bad}


def pairs(split: str, count: int = COUNT, seed: int = SEED) -> Iterator[dict]:
    """Make `count` pairs of a split, train or held_out: always the same for a seed."""
    maker = PairMaker(split, seed)
    return (maker.pair() for _ in range(count))


def write_rows(file: IO[bytes]) -> None:
    """Write the training pairs as lines of JSON."""
    file.writelines(json.dumps(pair).encode() + b"\n" for pair in pairs("train"))
