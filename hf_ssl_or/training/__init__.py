"""Training: arguments, optimizers, the loop, checkpoints."""
