"""A LLaMA of 3 billion parameters, with the blocks of Llama 3.2 3B.

60 billion tokens are 20 for each parameter (https://arxiv.org/abs/2203.15556). docs/configs.md has
memory and hours.
"""

base = "llama_1b.py"
n_layer = 28
n_head = 24
d_model = 3072
block_size = 4096
activation_checkpointing = True

global_batch_tokens = 2 * 1024 * 1024
max_steps = 29_000
warmup_steps = 1000
