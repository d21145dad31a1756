"""A model and a data set of seconds on a CPU, for bench/rows.py and bench_gpu_tiny.py."""

base = "bench_gpu.py"
sources = [{"path": "embedded", "max_documents": 40}]
tokenizer = "bytes"
vocab_size = 258

n_layer = 2
n_head = 2
d_model = 32
d_ff = 64
block_size = 64
global_batch_tokens = 8 * 64
eval_tokens = 16 * 64
device = "cpu"
compile = "false"
