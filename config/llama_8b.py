"""A LLaMA of 7.2 billion parameters, with the blocks of Llama 3 8B.

145 billion tokens are 20 for each parameter (https://arxiv.org/abs/2203.15556). docs/configs.md has
memory and hours.
"""

base = "llama_3b.py"
n_layer = 32
n_head = 32
d_model = 4096
d_ff = 14336

global_batch_tokens = 4 * 1024 * 1024
max_steps = 35_000
warmup_steps = 2000
