"""bench_gpu at a size at which a CPU rehearses all of bench/gpu.py within two minutes."""

base = "bench_tiny.py"
