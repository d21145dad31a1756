"""About four minutes on two CPU cores: a small LLaMA that writes Python."""

dataset = "quickstart"
sources = "embedded"
tokenizer = "bpe:4096"
val_fraction = 0.02

n_layer = 4
n_head = 6
d_model = 192
d_ff = 512
block_size = 256

global_batch_tokens = 8 * 256  # docs/log.md has what twice and half of it gave
max_steps = 800
learning_rate = 3e-3
min_lr = 3e-4
warmup_steps = 60
beta2 = 0.99

log_interval = 10
eval_interval = 200
eval_tokens = 100 * 256
save_interval = 200
