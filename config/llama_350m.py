"""A LLaMA of 369 M parameters, of GPT-3 medium's depth and width.

7 billion tokens are 20 for each parameter (https://arxiv.org/abs/2203.15556). docs/configs.md has
memory and hours.
"""

base = "llama100m.py"
# its rows are already shuffled; enough for the larger sizes too, which share the prepared set
dataset = "fineweb_edu"
sources = "hf:karpathy/fineweb-edu-100b-shuffle"

n_layer = 24
n_head = 16
d_model = 1024
d_ff = 2752
block_size = 2048

max_steps = 14_000
warmup_steps = 500
learning_rate = 4e-4
min_lr = learning_rate / 10

eval_interval = 500
save_interval = 500
