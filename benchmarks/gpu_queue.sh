#!/usr/bin/env bash
# Everything that wants a GPU, in three calls of at most four minutes, on a machine that is borrowed and has no network.
#
#   benchmarks/gpu_queue.sh 1|2|3 [--out DIR] [--state DIR] [--carried DIR] [--budget-s 230] [--only NAME ...]
#                                 [--redo NAME ...] [--cpu-smoke] [--list]
#
# Runs from a checkout, with a Python that has torch (PYTHON, else python3). See benchmarks/README.md.
set -eu
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python3}" "$here/_gpu_queue.py" "$@"
