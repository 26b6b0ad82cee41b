"""What is not the step: the log, the progress bar, the monitor, checkpoints and pushes are callbacks of the trainer."""
