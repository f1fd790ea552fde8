#!/usr/bin/env bash
# Style, types, import rules, then the tests. Arguments go to pytest, for example
#   bash scripts/test.sh tests/planning -k validator
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare test
.venv/bin/python -m ruff check .
.venv/bin/python -m mypy
.venv/bin/lint-imports
exec .venv/bin/python -m pytest "$@"
