"""What llama.cpp says of a .gguf file: run as a script by llama_cpp.py, with a folder that holds
asked.json. said.json and logprobs.npy come beside it.

The package xllamacpp brings llama.cpp and its HTTP server, which is asked on 127.0.0.1. torch is
not imported here: it takes longer than all the rest.
"""

import json
import os
import sys
from http.client import HTTPConnection
from pathlib import Path

import numpy as np

from plainllama.files import read_json, write_json


def answer(folder: Path) -> None:
    """Ask llama.cpp what folder/asked.json wants to know, and write what it says beside it."""
    asked = read_json(folder / "asked.json")
    server = start(asked)
    line = HTTPConnection(server.listening_address.removeprefix("http://"))
    ids = [post(line, "/tokenize", content=text, add_special=False, parse_special=False)["tokens"]
           for text in asked["texts"]]
    dialogs = []
    for dialog in asked["dialogs"]:
        prompt = post(line, "/apply-template", **dialog)["prompt"]
        found = post(line, "/tokenize", content=prompt, add_special=True, parse_special=True)
        dialogs.append(found["tokens"])
    greedy = []
    for prompt in asked["prompts"]:
        found = post(line, "/completion", prompt=prompt, n_predict=asked["new"],
                     samplers=["top_k"], top_k=1, return_tokens=True)
        greedy.append({"tokens": found["tokens"], "ended": found["stop_type"] == "eos"})
    logprobs = np.full((sum(len(window) - 1 for window in asked["windows"]), asked["entries"]),
                       -np.inf, np.float32)
    beginnings = [window[:n] for window in asked["windows"] for n in range(1, len(window))]
    for row, beginning in zip(logprobs, beginnings, strict=True):
        # half a character would be held back, with its log-probs: what is drawn is "a"
        found = post(line, "/completion", prompt=beginning, n_predict=1, samplers=["top_k"],
                     top_k=1, n_probs=asked["entries"], logit_bias=[[asked["filler"], 1e6]])
        for entry in found["completion_probabilities"][0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
    np.save(folder / "logprobs.npy", logprobs)
    write_json(folder / "said.json", {"ids": ids, "dialogs": dialogs, "greedy": greedy})


def start(asked: dict):
    """Start llama.cpp's server on a free port, everything beside the weights in fp32."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = asked["model"]
    options.n_ctx, options.n_parallel = asked["context"], 1
    options.cpuparams.n_threads = asked["threads"]
    options.n_gpu_layers = 0
    options.warmup = options.ui = False
    options.hostnames, options.port = ["127.0.0.1"], 0
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(options)


def post(line: HTTPConnection, path: str, **body) -> dict:
    """Send a request to the server, and read what it answers; RuntimeError if it refuses."""
    line.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    reply = line.getresponse()
    text = reply.read()
    if reply.status != 200:
        raise RuntimeError(f"{path}: {text.decode(errors='replace')[:1000]}")
    return json.loads(text)


if __name__ == "__main__":
    answer(Path(sys.argv[1]))
    os._exit(0)  # its threads have nothing left to do
