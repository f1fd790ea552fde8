#!/usr/bin/env bash
# Style, types, import rules, then the tests. Arguments go to pytest, for example
#   bash scripts/test.sh tests/planning -k validator
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare test
# The oldest megatron-core that is supported, beside the installed one.
export MEGATRON_CORE_PATH="${MEGATRON_CORE_PATH:-$PWD/.venv/megatron-core-0.12.1}"
if [ ! -d "${MEGATRON_CORE_PATH%%:*}" ]; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
    --target "$MEGATRON_CORE_PATH" megatron-core==0.12.1
fi
.venv/bin/python -m ruff check .
.venv/bin/python -m mypy
.venv/bin/lint-imports
# Two files of tests at a time: most of them wait for processes that start.
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
