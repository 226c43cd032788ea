#!/usr/bin/env bash
# Check everything: flake8, isort, mypy, the import rules, then pytest.
#
#   bash tests/run.sh [--slow] [pytest arguments]
#
# Needs no GPU. Every check runs, also after one has failed; the last line says which did.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup_env.sh test || {
    echo "tests/run.sh: FAILED: environment"
    exit 1
}

pytest_arguments=()
for argument in "$@"; do
    case "$argument" in
        --slow) pytest_arguments+=(-m "") ;; # the last -m counts: it takes the place of setup.cfg's "not slow"
        *) pytest_arguments+=("$argument") ;;
    esac
done

failed=()
check() {
    local name=$1
    shift
    printf '\n== %s\n' "$name"
    "$@" || failed+=("$name")
}
check flake8 python -m flake8 moepp_ds data_pipeline tests
check isort python -m isort --check-only moepp_ds data_pipeline tests
check mypy python -m mypy
check lint-imports lint-imports
# two workers: starting ranks is mostly waiting for imports; a file stays on one worker
check pytest python -m pytest --numprocesses 2 --dist loadfile ${pytest_arguments[@]+"${pytest_arguments[@]}"}

if [ ${#failed[@]} -gt 0 ]; then
    printf '\ntests/run.sh: FAILED: %s\n' "${failed[*]}"
    exit 1
fi
printf '\ntests/run.sh: passed\n'
