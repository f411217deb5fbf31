"""Training: the one loop, the base block, what an update leaves behind."""
