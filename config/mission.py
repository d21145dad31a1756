"""The mission on one GPU: llama100m at a context of 256, then lengthened (runs/mission.py).

The script sets length, warm-up and data set: as many steps as fit in its minutes.
"""

base = "llama100m_ctx256.py"
sources = "embedded"
dataset = "mission"
# minutes need many small steps, not few large ones
global_batch_tokens = 128 * 1024
max_steps = 100_000  # at most; the minutes decide
optimizer = "muon"
learning_rate = 2e-3  # Muon's loss is as good from 0.002 to 0.008 at a smaller size: docs/log.md
schedule = "linear"
min_lr = 0.0
eval_tokens = 512 * 1024
keep_last = 1
