#!/usr/bin/env bash
# Runs the test suite one process a file, side by side: for machines with many cores. Logs go to the folder given.
set -uo pipefail
cd "$(dirname "$0")/.."
logs=${1:?usage: parallel_tests.sh LOG_FOLDER}
mkdir -p "$logs"
export PYTHONPATH="$PWD/src:$PWD/tests"
ls tests/test_*.py | xargs -P "$(nproc)" -I{} sh -c \
  'timeout 500 python3 -m pytest -q -p no:cacheprovider {} >"$0/$(basename {} .py).log" 2>&1' "$logs"
tail -qn 1 "$logs"/test_*.log
