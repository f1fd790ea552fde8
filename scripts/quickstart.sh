#!/usr/bin/env bash
# Trains the quickstart on this machine: one edge process, two cloud processes. Arguments are overrides, for example
#   bash scripts/quickstart.sh train.iterations=20
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare run
exec .venv/bin/python -m ldt_schedules train configs/quickstart.yaml "$@"
