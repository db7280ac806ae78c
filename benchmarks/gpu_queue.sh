#!/usr/bin/env bash
# Everything that wants a GPU, in order of worth, on a machine that is borrowed for minutes and has no network.
#
#   benchmarks/gpu_queue.sh [--out DIR] [--state DIR] [--carried DIR] [--budget-s 560] [--only NAME ...] [--redo NAME ...]
#                           [--cpu-smoke] [--list]
#
# Runs from a checkout, with a Python that has torch (PYTHON, else python3). See benchmarks/README.md.
set -eu
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python3}" "$here/_gpu_queue.py" "$@"
