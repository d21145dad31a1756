"""One row, learned by heart: the loss must fall below 0.05 nats within two minutes on a CPU."""

base = "quickstart.py"
overfit_rows = 1
global_batch_tokens = 256
max_steps = 150
learning_rate = 2e-3
min_lr = 2e-4
warmup_steps = 10
eval_interval = 1000
eval_tokens = 256
save_interval = 1000
