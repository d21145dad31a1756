"""Ten minutes on two CPU cores: a small model to talk with, that calls a calculator and a calendar.

Its dialogs are made by a seed (embedded:chat). For those of your own give sources, e.g. 'my.jsonl'
with rows of messages, and init_from, a model that has read more than this.
"""

dataset = "chat"
documents = "chat"
sources = "embedded:chat"
tokenizer = "bytes"  # names and numbers are copied letter by letter
val_fraction = 0.02

n_layer = 4
n_head = 4
d_model = 128
d_ff = 344
block_size = 1024

global_batch_tokens = 4 * 1024
max_steps = 1600
optimizer = "muon"
learning_rate = 2.5e-3
min_lr = 0.0
schedule = "linear"
warmup_steps = 40

log_interval = 10
eval_interval = 250
eval_tokens = 16 * 1024
save_interval = 500
