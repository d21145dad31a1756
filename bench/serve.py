"""Streams of servers beside each other: python bench/serve.py --ckpt X [--against=…] [--stress=N]

Starts ours (sample.py --serve) and, on the same model and threads, `transformers serve` with its
continuous batching and llama.cpp's server (xllamacpp, f32), one request behind the other in turn.
Tokens/s and time to first token (median, 95th percentile) at 1, 8 and 32 streams; with
--stress=SECONDS 64 clients of ours come and go at random, what is answered is compared with the
answers alone, and the server's memory is watched.
"""

import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plainllama.command import CommandLine, parse_arguments, run_command
from plainllama.settings import UserError, key

LLAMA_CPP = """
import sys, time
import xllamacpp
o = xllamacpp.CommonParams()
o.model.path, o.n_ctx, o.n_parallel = sys.argv[1], 32 * int(sys.argv[4]), 32
o.cpuparams.n_threads, o.n_gpu_layers, o.ui = int(sys.argv[3]), 0, False
o.hostnames, o.port = ["127.0.0.1"], int(sys.argv[2])
o.cache_type_k = o.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(o)
time.sleep(1e6)
"""


@dataclass
class Flags:
    """What bench/serve.py takes."""

    ckpt: str = key("out", "a checkpoint, a run or a folder of runs")
    against: str = key("transformers,llama.cpp", "the others, with commas between (empty: none)")
    threads: int = key(2, "threads of each server", low=1)
    rounds: int = key(3, "turns of each server", low=1)
    tokens: int = key(64, "tokens of each stream", low=2)
    context: int = key(256, "tokens of a text, for llama.cpp", low=64)
    stress: int = key(0, "seconds of the stress (0: none)", low=0)


def command_of(name: str, folder: Path, port: int, f: Flags, scratch: str) -> list[str]:
    """Say how a server is started."""
    python = sys.executable
    if name == "ours":
        return [python, str(ROOT / "sample.py"), f"--ckpt={folder}", "--serve", f"--port={port}",
                "--batch=32", "--dtype=fp32"]
    if name == "transformers":
        return [str(Path(python).with_name("transformers")), "serve", str(folder), "--port",
                str(port), "--continuous-batching", "--device", "cpu", "--dtype", "float32"]
    gguf = f"{scratch}/model.gguf"
    subprocess.run([python, str(ROOT / "export.py"), f"--ckpt={folder}", f"--to={gguf}",
                    "--type=f32"], check=True, stdout=subprocess.DEVNULL)
    return [python, "-c", LLAMA_CPP, gguf, str(port), str(f.threads), str(f.context)]


@contextlib.contextmanager
def served(name: str, folder: Path, f: Flags) -> Iterator[tuple[str, int]]:
    """Run a server; its address and process id. UserError if it does not come up."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as scratch:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        log = open(f"{scratch}/log", "w+")  # noqa: SIM115
        process = subprocess.Popen(
            command_of(name, folder, port, f, scratch), stdout=log, stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": str(f.threads), "HF_HUB_OFFLINE": "1"})
        try:
            for _ in range(240):
                with contextlib.suppress(OSError):
                    urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                if process.poll() is not None:
                    break
                time.sleep(0.5)
            else:
                process.kill()
            if process.poll() is not None:
                log.seek(0)
                raise UserError(f"{name} does not start: {log.read()[-400:]}")
            yield f"http://127.0.0.1:{port}/v1", process.pid
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def stream(client, model: str, number: int, tokens: int, leave: float = 0.0) -> tuple:
    """Ask for one stream, and leave it after so many seconds if not 0; (seconds to the first part,
    tokens, text)."""
    begin, first, count, text = time.perf_counter(), 0.0, 0, ""
    prompt = f"{number}: def add_{number}(a, b):" * 4
    with client.completions.create(model=model, prompt=prompt, max_tokens=tokens, temperature=0,
                                   stream=True, stream_options={"include_usage": True}) as answer:
        for chunk in answer:
            first = first or time.perf_counter() - begin
            text += chunk.choices[0].text if chunk.choices else ""
            count = chunk.usage.completion_tokens if chunk.usage else count
            if leave and time.perf_counter() - begin > leave:
                break
    return first, count, text


def main(command: CommandLine) -> int:
    """Measure and print."""
    import openai

    from plainllama.weights.checkpoint import find_checkpoint

    f = command.flags
    folder = find_checkpoint(f.ckpt).resolve()
    names = ["ours", *filter(None, f.against.split(","))]
    if unknown := set(names) - {"ours", "transformers", "llama.cpp"}:
        raise UserError(f"--against={unknown.pop()} is neither transformers nor llama.cpp")
    with contextlib.ExitStack() as stack:
        clients, models, ours = {}, {}, 0
        for name in names:
            url, process = stack.enter_context(served(name, folder, f))
            ours = ours or process
            clients[name] = openai.OpenAI(base_url=url, api_key="none", timeout=600, max_retries=0)
            models[name] = str(folder) if name == "transformers" else (
                clients[name].models.list().data[0].id)
        for streams in (1, 8, 32):
            compare(clients, models, streams, f)
        return stressed(clients["ours"], models["ours"], ours, f) if f.stress else 0


def compare(clients: dict, models: dict, streams: int, f: Flags) -> None:
    """Print what each server does with so many streams at once."""
    rates: dict = {name: [] for name in clients}
    for turn in range(f.rounds + 1):
        for name, client in clients.items():
            begin = time.perf_counter()
            with ThreadPoolExecutor(streams) as pool:  # texts that no server has seen
                found = list(pool.map(lambda number, c=client, n=name, t=turn: stream(
                    c, models[n], t * streams + number, f.tokens), range(streams)))
            seconds = time.perf_counter() - begin
            firsts = sorted(first for first, *_ in found)
            if turn > 0:  # the first one warms up
                rates[name].append((sum(count for _, count, _ in found) / seconds,
                                    median(firsts), firsts[int(0.95 * (streams - 1))]))
    ours = median(rate for rate, *_ in rates["ours"])
    for name, rows in rates.items():
        rate, first, late = (median(column) for column in zip(*rows, strict=True))
        print(f"| {streams} streams, {name}: tokens/s, s to the first, 95 % | {rate:.1f} | "
              f"{first:.3f} | {late:.3f} | ours / it {ours / rate:.2f} |", flush=True)


def stressed(client, model: str, process: int, f: Flags) -> int:
    """Let 64 clients come and go; 1 if an answer is another one than alone."""
    alone = [stream(client, model, number, f.tokens)[2] for number in range(16)]
    begin = time.monotonic()
    end, sizes = begin + f.stress, []

    def one(seed: int) -> tuple[int, int]:
        draw, whole, wrong = random.Random(seed), 0, 0
        while time.monotonic() < end:
            number, leave = draw.randrange(16), draw.choice([0.0, 0.01, 0.5])
            text = stream(client, model, number, f.tokens, leave)[2]
            whole += int(leave == 0)
            wrong += int(leave == 0 and text != alone[number])
        return whole, wrong

    def watch() -> None:
        while time.monotonic() < end:
            time.sleep(max(1.0, f.stress / 30))
            pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
            sizes.append(pages * os.sysconf("SC_PAGE_SIZE") >> 20)

    with ThreadPoolExecutor(65) as pool:
        watched = pool.submit(watch)
        whole, wrong = (sum(column) for column in zip(*pool.map(one, range(64)), strict=True))
        watched.result()
    third = max(1, len(sizes) // 3)
    print(f"stress: {whole} whole answers, {wrong} other than alone; memory in the first third "
          f"{median(sizes[:third])} MB, in the last {median(sizes[-third:])}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    run_command(main, parse_arguments(__doc__, Flags, takes="files"))
