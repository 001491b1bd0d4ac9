#!/usr/bin/env bash
# `make bench-gpu` where there is no make: OUT=folder bash benchmarks/once.sh [--only checks sweep] [--commit 0123abc]
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" -m benchmarks.gpu --out "${OUT:?error: OUT is not set; give a folder for the results}" "$@"
