"""The run of bench/gpu.py: llama100m for a few minutes; dataset, length and schedule are its own.

Minutes need many small steps, not few large ones.
"""

base = "llama100m.py"
sources = "embedded"
global_batch_tokens = 64 * 1024
eval_tokens = 512 * 1024
keep_last = 1
