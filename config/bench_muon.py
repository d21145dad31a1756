"""Muon's arm of runs/optimizers.py: in all else AdamW's."""

base = "bench_adamw.py"
optimizer = "muon"
