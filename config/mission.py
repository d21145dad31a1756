"""The mission on one GPU: llama100m at a context of 256, then lengthened (runs/mission.py).

Length, schedule and data set are set by the script: as many steps as fit in its time.
"""

base = "llama100m_ctx256.py"
sources = "embedded"
dataset = "mission"
# minutes need many small steps, not few large ones, and a few hundred of them a higher rate
global_batch_tokens = 128 * 1024
learning_rate = 1e-3
min_lr = learning_rate / 10
eval_tokens = 512 * 1024
keep_last = 1
