# Sourced by scripts/run and scripts/test: makes .venv in the checkout when it is missing or out of date.
# Needs a Python 3.12 with the venv module and access to a package index, nothing else. Says what it does on stderr.
# shellcheck shell=bash

say() { printf 'vsuav: %s\n' "$*" >&2; }

# Is "$1" a Python that can make the environment? Run, not only looked at: a version manager's shim may exist for
# a version that is not installed, and Debian's python3 may lack ensurepip.
usable_python() {
    "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info[:2] < (3, 12))' >/dev/null 2>&1
}

# Prints the command of the first usable Python: $PYTHON if given, 3.12 where it may be found, then newer ones.
find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        usable_python "$PYTHON" && { printf '%s\n' "$PYTHON"; return; }
        say "PYTHON=$PYTHON is not a Python 3.12 or newer with the venv module"
        return 1
    fi
    for candidate in python3.12 \
        "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.12*/bin/python \
        /usr/local/bin/python3.12 /usr/bin/python3.12 /opt/python/cp312*/bin/python /opt/homebrew/bin/python3.12 \
        "$(uv python find --no-python-downloads 3.12 2>/dev/null || true)" \
        python3 python python3.13 python3.14; do
        if [ -n "$candidate" ] && usable_python "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    say "no usable Python 3.12 was found (looked for python3.12, pyenv's versions, uv's, python3, python)."
    say "Install one, on Debian or Ubuntu: apt-get install python3.12 python3.12-venv libpython3.12"
    say "or name one: PYTHON=/path/to/python3.12 $0"
    return 1
}

# What the environment was made from: another answer means that it must be brought up to date.
environment_stamp() {
    { pwd; cat pyproject.toml setup.cfg .python-version vsuav/native*.{cpp,h}; } | sha256sum | cut -d ' ' -f 1
}

# Leaves a complete .venv in the current folder (the checkout). One at a time: a second call waits for the first.
make_environment() {
    local stamp python
    stamp=$(environment_stamp)
    [ "$(cat .venv/vsuav-stamp 2>/dev/null)" = "$stamp" ] && .venv/bin/python -c '' 2>/dev/null && return

    exec 9>.venv.lock
    flock -n 9 || { say "another run is making the environment: waiting for it"; flock 9; }
    if [ "$(cat .venv/vsuav-stamp 2>/dev/null)" = "$stamp" ] && .venv/bin/python -c '' 2>/dev/null; then
        exec 9>&-
        return
    fi

    # .venv/vsuav-unfinished marks an installation that was cut off: packages may be half there, so begin again
    if [ -e .venv/vsuav-unfinished ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        [ -e .venv ] && say "the environment in .venv is not complete: making it again"
        say "making the environment in $PWD/.venv with $("$python" --version)"
        "$python" -m venv --clear .venv
    else
        say "bringing the environment in $PWD/.venv up to date"
    fi
    rm -f .venv/vsuav-stamp
    touch .venv/vsuav-unfinished
    say "installing vsuav and what it needs (PyTorch is large: the first time takes minutes)"
    if ! .venv/bin/python -m pip install --disable-pip-version-check --no-input --no-compile --editable '.[test]' 2>&1 9>&- |
        tee .venv/install.log |
        sed -u -n -E 's/^ *(Collecting|Downloading|Building|Installing|Successfully|ERROR)( .{0,110}).*/  \1\2/p' >&2; then
        tail -n 20 .venv/install.log >&2
        say "the installation failed; all that pip said is in $PWD/.venv/install.log"
        return 1
    fi
    rm .venv/vsuav-unfinished
    printf '%s\n' "$stamp" >.venv/vsuav-stamp
    exec 9>&-
    compgen -G 'vsuav/_native_*.so' >/dev/null ||
        say "vsuav's machine code was not compiled (that needs a C++ compiler): float32 will take twice as long"
    say "the environment is ready"
}
