"""Models on the disk: checkpoints, and Hugging Face folders."""
