"""The model of bench/gpu.py: llama100m, in updates of as many tokens as a GPU takes at once."""

base = "llama100m.py"
device = "cuda"
global_batch_tokens = 64 * 1024
