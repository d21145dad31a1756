"""Some minutes on two CPU cores: a small LLaMA that writes Python.

docs/log.md has what other sizes, batches and rates gave for the same time.
"""

dataset = "quickstart"
sources = "embedded"
tokenizer = "bpe:4096"
val_fraction = 0.02

# two layers: in so little time more tokens are worth more than more layers
n_layer = 2
n_head = 6
d_model = 192
d_ff = 512
block_size = 256

global_batch_tokens = 8 * 256
max_steps = 1000
optimizer = "muon"
learning_rate = 3e-3
min_lr = 3e-4
warmup_steps = 60
beta2 = 0.99

log_interval = 10
eval_interval = 250
eval_tokens = 256 * 256
save_interval = 250
