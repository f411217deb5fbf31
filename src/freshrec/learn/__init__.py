"""Training: the training loop, the base block, and the parts that strategies share."""
