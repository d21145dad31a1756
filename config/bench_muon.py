"""Muon's arm of bench/optimizers.py: in all else AdamW's."""

base = "bench_adamw.py"
optimizer = "muon"
