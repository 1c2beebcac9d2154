#!/usr/bin/env bash
# Format, lint, types and layers: what must hold before a commit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup_env.sh
set -x
ruff format --check .
ruff check .
mypy
python -m pytest tests/test_layers.py
