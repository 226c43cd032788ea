# Make this project's Python environment ready. To be sourced:   . launch/setup_env.sh [run|test|none]
#
# 1. Use the active virtual environment; else .venv at the top of the project, which is made when it is missing.
# 2. Install torch, then the project itself (editable), `test` with the tools of the tests. What pip was asked for
#    is remembered inside the environment, so nothing happens the next time.
# 3. Set what every program here wants: one OpenMP thread a process (ranks share the cores), and what PyTorch and
#    DeepSpeed compile inside the project.
#
# `none` makes and installs nothing: it uses .venv if there is one, else the Python that is on the path.

moepp_setup() {
    local root want torch stamp key
    root=$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    want=${1:-run}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$root/.cache/torch_extensions}
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$root/.cache/torch_inductor}
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        if [ "$want" != none ] && [ ! -x "$root/.venv/bin/python" ]; then
            "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
                echo "setup: ${PYTHON:-python3} is older than Python 3.10; name another one: PYTHON=python3.11" >&2
                return 1
            }
            echo "setup: making $root/.venv"
            "${PYTHON:-python3}" -m venv "$root/.venv" || return 1
        fi
        if [ -f "$root/.venv/bin/activate" ]; then
            . "$root/.venv/bin/activate" || return 1
        fi
    fi
    [ "$want" != none ] || return 0

    key=$(printf '%s\n' "$root" | cat - "$root/setup.cfg" "$root/pyproject.toml" | sha256sum | cut -d' ' -f1)
    for stamp in "$VIRTUAL_ENV/.moepp_ds-test" "$VIRTUAL_ENV/.moepp_ds-$want"; do # test includes run
        [ "$(cat "$stamp" 2> /dev/null)" != "$key" ] || return 0
    done
    # torch goes first and alone: DeepSpeed looks at it while it is being installed
    torch=$(sed -n 's/^ *\(torch[<>=].*\)$/\1/p' "$root/setup.cfg")
    echo "setup: installing $torch and the project into $VIRTUAL_ENV (a few minutes the first time)"
    python -m pip install --quiet "$torch" || return 1
    if [ "$want" = test ]; then
        python -m pip install --quiet --editable "$root[test]" || return 1
    else
        python -m pip install --quiet --editable "$root" || return 1
    fi
    echo "$key" > "$VIRTUAL_ENV/.moepp_ds-$want"
}

moepp_setup "$@"
