"""Streams of servers beside each other: python bench/serve.py --servers=ours=URL,other=URL

Each server runs already, on the same model and threads: ours (sample.py --serve), `transformers
serve`, llama.cpp's. URL is what stands before /completions (http://127.0.0.1:8000/v1), --models
their models' names, in the same order. Tokens/s and time to first token (median, 95th percentile)
at 1, 8 and 32 streams; with --stress=SECONDS 64 clients of the first server go at random, and what
it answers is compared with the answers that it gave alone.
"""

import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plainllama.command import CommandLine, parse_arguments, run_command
from plainllama.settings import UserError, key


@dataclass
class Flags:
    """What bench/serve.py takes."""

    servers: str = key("ours=http://127.0.0.1:8000/v1", "NAME=URL, with commas between")
    models: str = key("", "the models' names, with commas between (empty: the first of /models)")
    rounds: int = key(3, "turns of each server", low=1)
    tokens: int = key(64, "tokens of each stream", low=2)
    stress: int = key(0, "seconds of the stress (0: none)", low=0)


def stream(client, model: str, number: int, tokens: int, leave: float = 0.0) -> tuple:
    """Ask for one stream, and leave it after so many seconds if not 0; (seconds to the first part,
    parts, text)."""
    begin, first, parts, text = time.perf_counter(), 0.0, 0, ""
    prompt = f"{number}: def add_{number}(a, b):" * 4
    with client.completions.create(model=model, prompt=prompt, max_tokens=tokens, temperature=0,
                                   stream=True) as answer:
        for chunk in answer:
            first = first or time.perf_counter() - begin
            parts += 1
            text += chunk.choices[0].text if chunk.choices else ""
            if leave and time.perf_counter() - begin > leave:
                break
    return first, parts, text


def main(command: CommandLine) -> int:
    """Measure and print."""
    import openai

    f = command.flags
    servers = dict(item.partition("=")[::2] for item in f.servers.split(","))
    if not all(servers.values()):
        raise UserError("--servers=NAME=URL,NAME=URL")
    clients = {name: openai.OpenAI(base_url=url, api_key="none", timeout=600, max_retries=0)
               for name, url in servers.items()}
    named = f.models.split(",") if f.models else []
    models = {name: named[i] if i < len(named) else client.models.list().data[0].id
              for i, (name, client) in enumerate(clients.items())}
    for streams in (1, 8, 32):
        rates: dict = {name: [] for name in clients}
        for turn in range(f.rounds + 1):
            for name, client in clients.items():
                begin = time.perf_counter()
                with ThreadPoolExecutor(streams) as pool:
                    found = list(pool.map(lambda number, c=client, n=name: stream(
                        c, models[n], number, f.tokens), range(streams)))
                seconds = time.perf_counter() - begin
                firsts = sorted(first for first, *_ in found)
                if turn > 0:  # the first one warms up
                    rates[name].append((sum(parts for _, parts, _ in found) / seconds,
                                        median(firsts), firsts[int(0.95 * (streams - 1))]))
        ours = median(rate for rate, *_ in rates[next(iter(rates))])
        for name, rows in rates.items():
            rate, first, late = (median(column) for column in zip(*rows, strict=True))
            print(f"| {streams} streams, {name}: parts/s, s to the first, 95 % | {rate:.1f} | "
                  f"{first:.3f} | {late:.3f} | ours / it {ours / rate:.2f} |", flush=True)
    return stressed(next(iter(clients.values())), next(iter(models.values())), f) if f.stress else 0


def stressed(client, model: str, f: Flags) -> int:
    """Let 64 clients come and go; 1 if an answer is another one than alone."""
    alone = [stream(client, model, number, f.tokens)[2] for number in range(16)]
    end = time.monotonic() + f.stress

    def one(seed: int) -> tuple[int, int]:
        draw, whole, wrong = random.Random(seed), 0, 0
        while time.monotonic() < end:
            number, leave = draw.randrange(16), draw.choice([0.0, 0.01, 0.5])
            text = stream(client, model, number, f.tokens, leave)[2]
            whole += int(leave == 0)
            wrong += int(leave == 0 and text != alone[number])
        return whole, wrong

    with ThreadPoolExecutor(64) as pool:
        whole, wrong = (sum(column) for column in zip(*pool.map(one, range(64)), strict=True))
    print(f"stress: {whole} whole answers, {wrong} other than alone", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    run_command(main, parse_arguments(__doc__, Flags, takes="files"))
