"""A small translator from rows {"en": ..., "de": ...}: some 30,000 pairs, 25 minutes on two cores.

Each row is a dialog of one question and its answer. Score it with
  python eval.py --ckpt out/translate --tasks= --generate=test.jsonl --metrics=bleu,chrf
where rows of test.jsonl have a prompt and a reference.
"""

dataset = "translate"
documents = "chat"
sources = [{"path": "translations.jsonl", "fields": {"prompt": "en", "response": "de"}}]
tokenizer = "bpe:4096"
val_fraction = 0.02

n_layer = 4
n_head = 4
d_model = 192
d_ff = 512
block_size = 256
tie_embeddings = True

global_batch_tokens = 16 * 256
max_steps = 1600
optimizer = "muon"
learning_rate = 4e-3
min_lr = 0.0
schedule = "linear"
warmup_steps = 50

log_interval = 20
eval_interval = 400
eval_tokens = 64 * 256
save_interval = 500
