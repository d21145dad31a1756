"""The mission rehearsed at a size that two CPU cores train: all else is mission.py's.

python runs/mission.py --config=config/mission_cpu.py --minutes=3 --out=runs/results/mission-cpu
"""

base = "mission.py"
n_layer = 4
n_head = 4
d_model = 256
d_ff = 704
tie_embeddings = True  # the embedding of 32,000 entries is most of so small a model
global_batch_tokens = 4 * 256
learning_rate = 4e-3  # the best of five for Muon at a smaller size: docs/log.md
device = "cpu"
compile = "false"  # a start costs half a minute more with it, and there are four
eval_tokens = 8 * 1024
