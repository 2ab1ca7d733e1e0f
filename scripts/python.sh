# Sourced by the run scripts: ROOT is the repository; `need` sets PYTHON, `install` makes .venv, `report` calls utils/report.py,
# `fail` ends with one line.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# glibc keeps freed memory: on a CPU, to fetch a batch anew from the system takes longer than to fill it (docs/PERFORMANCE.md)
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-4611686018427387904} MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
fail() { echo "$(basename "$0"): error: $1" >&2; exit 2; }

# need PACKAGE [PACKAGE ...]: PYTHON, if it is given; or `python`, as of an active environment, or else that of .venv, where it
# has the packages
need() {
  local given=${PYTHON:-}
  for PYTHON in ${given:+"$given"} python "$ROOT/.venv/bin/python"; do
    [[ $PYTHON != */* || $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON # some scripts leave this folder
    "$PYTHON" -c "import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))" "$@" 2> /dev/null && return 0
    [ -z "$given" ] || fail "PYTHON=$given is no python that has $*"
  done
  return 1
}

# report RUN [RUN ...] [flags]: with this repository's modules, also where the caller's folder has some of their names
report() {
  "$PYTHON" -c 'import runpy, sys; sys.path[0] = sys.argv.pop(1); runpy.run_module("utils.report", run_name="__main__", alter_sys=True)' "$ROOT" "$@"
}

# install FILE [FILE ...]: makes .venv, with the packages of requirements files
install() {
  echo "installing $* into $ROOT/.venv (once; PyTorch is large)" >&2
  PYTHON=$ROOT/.venv/bin/python
  "$PYTHON" -m pip --version &> /dev/null || python3 -m venv "$ROOT/.venv" # also over one that was left half made
  for file in "$@"; do "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/$file"; done
}
