"""The mission rehearsed in minutes on two CPU cores: all else is mission.py's.

python runs/mission.py --config=config/mission_cpu.py --minutes=3 --out=out/mission-cpu-results

runs/results/mission-cpu was made at twice this width, with four times the tokens a step, compiled.
"""

base = "mission.py"
n_layer = 4
n_head = 4
d_model = 128
d_ff = 352
tie_embeddings = True  # the embedding of 32,000 entries is most of so small a model
global_batch_tokens = 4 * 256
learning_rate = 4e-3  # the best of five for Muon at a smaller size: docs/log.md
device = "cpu"
compile = "false"  # a start costs half a minute more with it, and there are four
eval_tokens = 8 * 1024
