"""A LLaMA of 1.1 billion parameters, with the blocks of Llama 3.2 1B.

22 billion tokens are 20 for each parameter (https://arxiv.org/abs/2203.15556). docs/configs.md has
memory and hours.
"""

base = "llama_350m.py"
n_layer = 16
n_head = 32
n_kv_head = 8
d_model = 2048
d_ff = 8192
rope_theta = 500_000.0

global_batch_tokens = 1024 * 1024
max_steps = 21_000
learning_rate = 3e-4
min_lr = learning_rate / 10
