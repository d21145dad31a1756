"""The mission at a size that two CPU cores train: all else is mission.py's.

python runs/mission.py --config=config/mission_cpu.py --out=runs/results/mission-cpu
"""

base = "mission.py"
n_layer = 4
n_head = 4
d_model = 256
d_ff = 704
tie_embeddings = True  # the embedding of 32,000 entries is most of so small a model
global_batch_tokens = 16 * 256
learning_rate = 4e-3  # the best of five for Muon at a smaller size: docs/log.md
min_lr = learning_rate / 10
optimizer = "muon"
compile = "true"  # half a minute at every start; bench/step.py: a third faster
eval_tokens = 64 * 1024
