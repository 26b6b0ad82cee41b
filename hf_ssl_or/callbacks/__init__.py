"""What is not the step: log, progress bar, monitor, checkpoints and pushes are callbacks of the trainer."""
