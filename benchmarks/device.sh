#!/bin/bash
# What memnoise costs on this machine's GPU, and that it does there what it does on a CPU: see benchmarks/README.md.
# Needs torch and numpy; PYTHON names the interpreter.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHONPATH="$root:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -u -m on_device "$@"
