#!/usr/bin/env bash
# The test suite: bash run_tests.sh [flags of pytest]. PYTHON=...: an interpreter to use instead of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source utils/python.sh requirements.txt tests/requirements.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest -q "$@"
