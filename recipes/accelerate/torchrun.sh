#!/bin/sh
# All processes of one machine, on GPUs or (training.device=cpu) on the CPU:
#   recipes/accelerate/torchrun.sh 8 RECIPE.yaml --output RUN_DIR [training.fsdp=true]
# Stopped by SIGTERM or Ctrl-C, the run saves its state; the same command continues with it, with any number of processes.
set -eu
processes=$1
shift
exec torchrun --standalone --nproc_per_node "$processes" -m hf_ssl_or train "$@" --resume
