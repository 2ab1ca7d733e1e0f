# Sourced by the run scripts, in the repository's root: sets PYTHON. An interpreter given as PYTHON=... is used as it is; otherwise
# the one of .venv, which is made, and brought up to date with the requirements files, when needed.
#   source utils/python.sh FILE [FILE ...]
if [ -z "${PYTHON:-}" ]; then
  for file in "$@"; do
    stamp=".venv/installed/$(echo "$file" | tr / _)"
    if ! cmp -s "$file" "$stamp"; then
      echo "installing $file into .venv (once; PyTorch is large)" >&2
      [ -x .venv/bin/python ] || python3 -m venv .venv
      .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$file"
      mkdir -p .venv/installed
      cp "$file" "$stamp"
    fi
  done
  PYTHON=.venv/bin/python
fi
