"""llama100m_pi1024 without the interpolation: the same tokens, positions as they are.

Which of the two is ahead depends on the model: runs/context.py tries both on a small one.
"""

base = "llama100m_pi1024.py"
rope_scaling = "none"
rope_factor = 1.0
