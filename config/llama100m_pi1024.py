"""Position interpolation: llama100m_ctx256 fine-tuned at four times its context.

The positions are divided by 4 (https://arxiv.org/abs/2306.15595), so that 1024 of them lie where
the model knows 256.
"""

base = "llama100m_ctx256.py"
init_from = "out/llama100m_ctx256"
block_size = 1024
rope_scaling = "linear"
rope_factor = 4.0

max_steps = 200
learning_rate = 1e-4
min_lr = 1e-5
warmup_steps = 20
eval_interval = 50
