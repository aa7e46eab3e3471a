# Sourced by every finding. Gives it a folder of its own in $tmp, removed at the end, and two commands:
#   packages NAME==VERSION ...   makes a fresh virtual environment that holds these
#   run                          runs the Python program on stdin in it, apart from the caller's packages and folder
# The Python is the one that make would take (.ci/find-python), or the caller's: PYTHON=/some/python3.12 bash findings/NAME.sh

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

packages() {
    local base
    if ! base=$("$(dirname "${BASH_SOURCE[0]}")/../.ci/find-python" "${PYTHON:-}"); then
        echo "Nothing was checked: there is no Python to use. Name one with PYTHON=..." >&2
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
