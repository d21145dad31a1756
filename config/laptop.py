"""One night on a laptop: 20 M parameters, 66 M tokens, by default of TinyStories.

Your own text: --sources=FOLDER --dataset=NAME; below some 20 MB of it quickstart.py is the better
size. docs/configs.md has the hours; --max_minutes=480 stops in the morning with a whole checkpoint.
"""

dataset = "tinystories"
sources = "hf:roneneldan/TinyStories"
tokenizer = "bpe:8192"

n_layer = 8
n_head = 6
d_model = 384
d_ff = 1024
block_size = 512

global_batch_tokens = 16 * 1024
max_steps = 4000
optimizer = "muon"
learning_rate = 2e-3
min_lr = 2e-4
warmup_steps = 100

eval_interval = 250
eval_tokens = 128 * 1024
save_interval = 250
