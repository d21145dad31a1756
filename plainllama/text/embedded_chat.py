"""The dialogs of `embedded:chat`, made by a seed: small enough that a model of two million
parameters learns them within minutes, and each answer is right or wrong.

Sums and weekdays by functions, facts that are told and asked for later, words written in another
way, small talk, and questions for which no function is there. What is held out has other numbers,
names and words, and other ways to ask: the pieces of both are the same.
"""

import datetime
import json
import random
import zlib
from collections.abc import Callable, Iterator
from itertools import product
from typing import IO

COUNT, SEED = 8000, 1  # of the training dialogs
LONGEST = 500  # tokens of a dialog, a byte each
HELD_OUT = 6  # one of so many numbers, names, words and ways to ask is for held-out dialogs alone
OPENINGS = ["", "Please tell me: ", "Hi. ", "Well, ", "Now, ", "One question: ", "Ok. ", "Hm, ",
            "Quickly: "]
CONSONANTS, VOWELS, LAST = "bdfghjklmnprstvwz", "aeiou", ["", "", "n", "r", "s", "l", "m"]
# as sample.py --tools=runs/chat_tools.py describes them
SCHEMAS = {name: {"name": name, "description": says, "parameters": {
    "type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}}
    for name, says, argument in (("calculator", "Work out a sum.", "expression"),
                                 ("weekday", "Name the day of a date.", "date"))}
OPERATIONS = ["plus", "minus", "times"]
FACTS = {"name": "My name is {}.", "town": "I live in the town {}.", "dog": "My dog is called {}."}
ASKED = {"name": ["What is my name?", "Who am I?"],
         "town": ["Where do I live?", "What is my town?"],
         "dog": ["What is my dog called?", "Who is my dog?"]}
TOLD = {"name": "Your name is {}.", "town": "You live in {}.", "dog": "Your dog is called {}."}
WORDS: dict[str, Callable[[str], str]] = {
    "Write {} in capitals.": str.upper, "Spell the word {}.": "-".join,
    "Which letter does {} begin with?": lambda word: word[0],
    "Which letter does {} end with?": lambda word: word[-1],
    "Say {} twice.": lambda word: f"{word} {word}"}
TALK = {"Hello!": "Hello! What can I do for you?", "Thank you.": "You are welcome.",
        "How are you?": "I am well, thank you.", "Good morning.": "Good morning!"}
NO_TOOL = {"calculator": "I have no calculator.", "weekday": "I have no calendar."}


class Maker:
    """Draws dialogs of one split, "train" or "held_out"."""

    def __init__(self, split: str, seed: int):
        self.held_out = split == "held_out"
        self.draw = random.Random(f"{split}/{seed}")
        self.numbers = self.share(list(product(range(2, 100), range(2, 100))))
        self.days = self.share([datetime.date(2001, 1, 1) + datetime.timedelta(n)
                                for n in range(9000)])

    def share(self, whole: list) -> list:
        """Take this split's part of what is drawn from: another for each split."""
        shuffled = random.Random(len(whole)).sample(whole, len(whole))
        return [item for i, item in enumerate(shuffled) if (i % HELD_OUT == 0) == self.held_out]

    def name(self) -> str:
        """Make a name of two or three syllables: too many to be known by heart, and so copied."""
        while True:
            syllables = [self.draw.choice(CONSONANTS) + self.draw.choice(VOWELS)
                         for _ in range(self.draw.choice([2, 2, 3]))]
            name = "".join([*syllables, self.draw.choice(LAST)]).capitalize()
            if (zlib.crc32(name.encode()) % HELD_OUT == 0) == self.held_out:
                return name

    def asking(self, *ways: str) -> str:
        """Ask in one of the ways, behind an opening."""
        pairs = [(opening, way) for i, opening in enumerate(OPENINGS) for j, way in enumerate(ways)
                 if ((i + 2 * j) % 3 == 1) == self.held_out]
        opening, way = self.draw.choice(pairs)
        inside = opening.endswith((", ", ": "))  # of a sentence
        return opening + (way[0].lower() + way[1:] if inside else way)

    def dialog(self) -> dict:
        """Make a dialog that of at most LONGEST tokens."""
        while True:
            if size_of(made := self.draft()) <= LONGEST:
                return made

    def draft(self) -> dict:
        """Make a dialog of facts that are told, other turns, and questions for the facts."""
        draw, kinds = self.draw, [self.sum, self.weekday, self.word, self.talk]
        tools = draw.choices([[], ["calculator"], ["weekday"], list(SCHEMAS)], [2, 3, 3, 3])[0]
        turns = [turn for make in draw.choices(kinds, [4, 4, 2, 1], k=draw.randint(0, 2))
                 for turn in make(tools)]
        told = draw.sample(list(FACTS), draw.randint(0 if turns else 1, 1 if len(turns) > 2 else 2))
        names = {fact: self.name() for fact in told}
        before = [turn for fact in told for turn in spoken(
            self.asking(FACTS[fact].format(names[fact])), TOLD[fact].format(names[fact]))]
        asked = [turn for fact in (draw.choices(told, k=draw.randint(1, 4)) if told else [])
                 for turn in spoken(self.asking(*ASKED[fact]), TOLD[fact].format(names[fact]))]
        system = [{"role": "system", "content": "Answer in one sentence."}]
        messages = [*(system if draw.random() < 0.2 else []), *before, *turns, *asked]
        return {"messages": messages, "tools": [SCHEMAS[name] for name in tools]}

    def sum(self, tools: list[str]) -> list[dict]:
        """Ask for a sum, difference or product."""
        (a, b), word = self.draw.choice(self.numbers), self.draw.choice(OPERATIONS)
        question = self.asking(f"What is {a} {word} {b}?", f"How much is {a} {word} {b}?")
        result = {"plus": a + b, "minus": a - b, "times": a * b}[word]
        return with_call(question, "calculator", {"expression": f"{a} {word} {b}"},
                         str(result), f"{a} {word} {b} is {result}.", tools)

    def weekday(self, tools: list[str]) -> list[dict]:
        """Ask which day of the week a date is."""
        day = self.draw.choice(self.days)
        question = self.asking(f"Which weekday is {day}?", f"What day was {day}?")
        return with_call(question, "weekday", {"date": str(day)}, f"{day:%A}",
                         f"{day} is a {day:%A}.", tools)

    def word(self, tools: list[str]) -> list[dict]:
        """Ask for a word in another form."""
        word, way = self.name().lower(), self.draw.choice(list(WORDS))
        return spoken(self.asking(way.format(word)), WORDS[way](word))

    def talk(self, tools: list[str]) -> list[dict]:
        """Be friendly."""
        said = self.draw.choice(list(TALK))
        return spoken(self.asking(said), TALK[said])


def size_of(dialog: dict) -> int:
    """Count the tokens of a dialog, a byte each, or a few more."""
    calls = [json.dumps(call) for message in dialog["messages"]
             for call in message.get("tool_calls", ())]
    texts = [message["content"] for message in dialog["messages"]]
    listed = [json.dumps(tool) + "\n" for tool in dialog["tools"]]
    return sum(map(len, (*calls, *texts, *listed))) + 2 * len(texts) + 26 * len(calls) + 24


def spoken(question: str, answer: str) -> list[dict]:
    """Make the two messages of a question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def with_call(question: str, name: str, arguments: dict, result: str, answer: str,
              tools: list[str]) -> list[dict]:
    """Make a question that a function answers or, where it is not there, its refusal."""
    if name not in tools:
        return spoken(question, NO_TOOL[name])
    ask, say = spoken(question, answer)
    call = {"role": "assistant", "content": "", "tool_calls": [
        {"name": name, "arguments": arguments}]}
    return [ask, call, {"role": "tool", "content": result}, say]


def dialogs(split: str, count: int = COUNT, seed: int = SEED) -> Iterator[dict]:
    """Make `count` dialogs of a split, train or held_out: always the same for a seed."""
    maker = Maker(split, seed)
    return (maker.dialog() for _ in range(count))


def write_rows(file: IO[bytes]) -> None:
    """Write the training dialogs as lines of JSON."""
    file.writelines(json.dumps(dialog).encode() + b"\n" for dialog in dialogs("train"))
