"""The mission in about a minute on a CPU, with bytes as tokens: for the tests."""

base = "mission.py"
sources = [{"path": "embedded", "max_documents": 40}]
tokenizer = "bytes"
n_layer = 2
n_head = 2
d_model = 32
d_ff = 64
block_size = 64
global_batch_tokens = 8 * 64
max_steps = 60
learning_rate = 4e-3
device = "cpu"
compile = "false"
eval_tokens = 1024
sample_tokens = 8
