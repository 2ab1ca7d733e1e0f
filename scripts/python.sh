# Sourced by the run scripts: ROOT is the repository; `need` sets PYTHON, `install` makes .venv, `fail` ends with one line.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# glibc keeps freed memory: on a CPU, to fetch a batch anew from the system takes longer than to fill it (docs/PERFORMANCE.md)
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-4611686018427387904} MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
fail() { echo "$(basename "$0"): error: $1" >&2; exit 2; }

# need PACKAGE [PACKAGE ...]: PYTHON, if it is given; or `python`, as of an active environment, or else that of .venv, where it
# has the packages
need() {
  if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON" > /dev/null || fail "PYTHON=$PYTHON is no program"
    return
  fi
  for PYTHON in python "$ROOT/.venv/bin/python"; do
    "$PYTHON" -c "import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))" "$@" 2> /dev/null && return 0
  done
  return 1
}

# install FILE [FILE ...]: makes .venv, with the packages of requirements files
install() {
  echo "installing $* into $ROOT/.venv (once; PyTorch is large)" >&2
  PYTHON=$ROOT/.venv/bin/python
  [ -x "$PYTHON" ] || python3 -m venv "$ROOT/.venv"
  for file in "$@"; do "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/$file"; done
}
