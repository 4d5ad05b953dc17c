# What the scripts that set up an environment share; sourced by them, from the repository's root.

say() { echo "setup: $*" >&2; }
fail() { say "$@"; exit 1; }

python_fits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; }

find_python() {
    local candidate candidates=${PYTHON:-python3 python3.12 python3.11 python3.10}
    for candidate in $candidates; do
        if python_fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "sb3_dsrl needs Python 3.10, 3.11 or 3.12, and none of these is one: $candidates;" \
        "install it and run: make setup PYTHON=/path/to/python"
}

# Makes the environment $1, unless it is there. One without a working pip is half-made: it is made anew.
make_venv() {
    local python
    if python_fits "$1/bin/python" && "$1/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python cannot create virtual environments; install the missing module: apt-get install python3-venv"
    say "creating $1 with $("$python" -V)"
    "$python" -m venv --clear "$1"
}
