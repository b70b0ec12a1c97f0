#!/bin/sh
# The quickstart on two processes: DDP over NCCL where each has a GPU, over gloo on the CPU.
exec torchrun --standalone --nproc-per-node "${1:-2}" "$(dirname "$0")/quickstart.py"
