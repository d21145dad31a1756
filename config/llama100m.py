"""A LLaMA of 113 M parameters without embeddings, on OpenWebText, as the LLaMA paper trains."""

dataset = "openwebtext"
sources = "hf:ashaba1in/small_openwebtext"
tokenizer = "mistral"

n_layer = 16
n_head = 12
d_model = 768
d_ff = 2048
block_size = 1024

# one pass over about 1.2 billion tokens, half a million a step
global_batch_tokens = 512 * 1024
max_steps = 2300
learning_rate = 6e-4
min_lr = learning_rate / 10
warmup_steps = 200
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

eval_interval = 100
save_interval = 100
