# Sourced by the scripts: makes a virtual environment of its own for each purpose, once.
#   environment NAME PIP_ARGUMENT...   -> $PYTHON is its interpreter
# It is made anew when the arguments, the Python, the compiler, the sources of the build, or $EXTRA_SOURCES change.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1

environment() {
  local directory=".venv-$1"
  shift
  PYTHON="$PWD/$directory/bin/python"
  local stamp
  stamp=$({ echo "$@" "${JAX_KVPOOL_CUDA_WHEELS:-}"; "${BASE_PYTHON:-python3}" -V; command -v nvcc || true; cat pyproject.toml CMakeLists.txt cmake/* csrc/* ${EXTRA_SOURCES:-}; } | sha256sum)
  if [[ ! -e $directory/stamp || $(<"$directory/stamp") != "$stamp" ]]; then
    rm -rf "$directory"
    "${BASE_PYTHON:-python3}" -m venv "$directory" || return
    "$PYTHON" -m pip install -q "$@" || return  # where `set -e` is off: in a condition
    echo "$stamp" >"$directory/stamp"
  fi
}
