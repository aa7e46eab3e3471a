# Sourced by every finding. Gives it a folder of its own in $tmp, removed at the end, and two commands:
#   packages NAME==VERSION ...   makes a fresh virtual environment that holds these
#   run                          runs the Python program on stdin in it, apart from the caller's packages and folder
# The caller may name the Python to use: PYTHON=/some/python3.12 bash findings/NAME.sh

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

packages() {
    local candidates=(python3.12 python3.13 python3) candidate base=
    if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
            base=$candidate
            break
        fi
    done
    if [ -z "$base" ]; then
        echo "Nothing was checked: no Python 3.12 or later among: ${candidates[*]}. Name one with PYTHON=..." >&2
        exit 2
    fi
    if ! { "$base" -m venv "$tmp/venv" &&
        "$tmp/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }; then
        echo "Nothing was checked: these packages could not be installed: $*" >&2
        exit 2
    fi
}

run() {
    (cd "$tmp" && JAX_PLATFORMS=cpu TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$tmp/venv/bin/python" -I -)
}
