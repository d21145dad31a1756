"""As lora_8b.py, on a GPU of 10 GB: the model's matrices are held in 4 bits (nf4)."""

base = "lora_8b.py"
frozen_dtype = "nf4"
