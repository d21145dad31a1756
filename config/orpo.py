"""As config/dpo.py, but with ORPO: preferences and the chosen answers at once, without a reference.
"""

base = "dpo.py"

objective = "orpo"
learning_rate = 3e-4
