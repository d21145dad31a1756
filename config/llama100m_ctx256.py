"""llama100m at a short context, to be lengthened by llama100m_pi1024.py."""

base = "llama100m.py"
block_size = 256
