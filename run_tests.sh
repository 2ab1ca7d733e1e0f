#!/usr/bin/env bash
# The test suite: bash run_tests.sh [flags of pytest]. PYTHON=...: an interpreter (python, if it has the packages, or else that of
# .venv, which is made).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/python.sh"
need torch torchvision tqdm tensorboard sklearn matplotlib pytest xdist ruff || install requirements.txt tests/requirements.txt
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest -q -n 2 --dist worksteal "$@"
