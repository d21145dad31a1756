"""The model of bench/gpu.py: llama100m, as it trains."""

base = "llama100m.py"
device = "cuda"
