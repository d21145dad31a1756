"""A minute on two CPU cores: the model of config/chat.py learns which answers are preferred (DPO).

The pairs are made by a seed (embedded:preference). For your own give sources, e.g. 'my.jsonl' with
rows of prompt, chosen and rejected, and init_from, a model that was tuned on dialogs.
"""

dataset = "preference"
documents = "preference"
sources = "embedded:preference"
tokenizer = "data/chat"
val_fraction = 0.05
init_from = "out/chat"

objective = "dpo"
preference_beta = 0.1

global_batch_tokens = 4 * 1024
max_steps = 100
learning_rate = 1e-4
min_lr = 0.0
schedule = "linear"
warmup_steps = 10
weight_decay = 0.0

log_interval = 5
eval_interval = 25
eval_tokens = 16 * 1024
save_interval = 50
