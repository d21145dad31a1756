"""Adapters beside a Llama 3 8B, on one GPU of 24 GB: its weights stay as they are, in bf16.

Put the model's folder into models/ and your dialogs, rows of messages, into my.jsonl; prepare.py
and train.py take this file. With rope_scaling and all else that is not said here it is as the
model's own config says.
"""

dataset = "my_dialogs"
documents = "chat"
sources = "my.jsonl"
tokenizer = "models/Llama-3-8B/tokenizer.json"
init_from = "models/Llama-3-8B"

n_layer = 32
n_head = 32
n_kv_head = 8
d_model = 4096
d_ff = 14336
block_size = 1024
rope_theta = 500000.0

lora_r = 16
lora_alpha = 32
frozen_dtype = "bf16"
activation_checkpointing = True

epochs = 2
global_batch_tokens = 32 * 1024
learning_rate = 2e-4
min_lr = 2e-5
warmup_steps = 20
weight_decay = 0.01
