"""AdamW's arm of runs/optimizers.py: the quickstart's model, evaluated often, without samples."""

base = "quickstart.py"
optimizer = "adamw"
eval_interval = 50
sample_tokens = 0
save_interval = 400
keep_last = 1
