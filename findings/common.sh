# Sourced by every finding. Gives it a folder of its own in $tmp, removed at the end, and two commands:
#   packages NAME==VERSION ...   makes a fresh virtual environment that holds these
#   run                          runs the Python program on stdin in it, apart from the caller's packages and folder
# The Python is the one that make would take (.ci/find-python), or the caller's: PYTHON=/some/python3.12 bash findings/NAME.sh
# H200_TARGET is for programs that compile for that GPU without one.

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

export H200_TARGET='
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  name: "NVIDIA H200"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
'
