"""A grid of runs as one file: what is in the file, running it, and gathering what the runs measured."""
