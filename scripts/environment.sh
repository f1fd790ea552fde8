# Sourced by the other scripts: makes .venv in the repository and installs the project into it, if need be.
#
#   prepare run       what a training run needs
#   prepare test      the same and what the tests need
#
# Afterwards the working directory is the repository.
#
# A stamp in .venv remembers what was installed, from which files and where, so that a second call returns at once.
# The callers run under `set -euo pipefail`: whatever fails here ends them, and no stamp is written.

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

find_python() {
  local candidate
  for candidate in python3.12 python3.11 python3.10 python3; do
    # The import too: Debian's python3 comes without what `python3 -m venv` needs.
    if command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "No Python 3.10 or newer with the modules venv and ensurepip was found; tried python3.12, python3.11," >&2
  echo "python3.10 and python3. Install one, on Debian or Ubuntu for example: apt-get install python3 python3-venv" >&2
  return 1
}

# The first line of a stamp is the place (a moved environment does not work), the second the files' checksum.
wanted_stamp() {
  pwd
  cat setup.py pyproject.toml constraints.txt | cksum
}

is_installed() {
  [ -f ".venv/stamp-$1" ] && [ "$(cat ".venv/stamp-$1")" = "$(wanted_stamp)" ]
}

# A .venv that is missing, half made or made for another place is made anew.
make_environment() {
  local python stamp
  for stamp in .venv/stamp-*; do
    if [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" != "$PWD" ]; then
      rm -f .venv/bin/python
    fi
  done
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python="$(find_python)"
    echo "Making .venv with $("$python" --version) …" >&2
    "$python" -m venv --clear .venv
  fi
}

pip_install() {
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@"
}

prepare() {
  local purpose="$1" extra="" started=$SECONDS
  cd "$repository"
  # What the tests need includes what a run needs.
  if is_installed test || is_installed "$purpose"; then
    return
  fi
  [ "$purpose" != test ] || extra="[test]"
  make_environment
  echo "Installing torch into .venv (only the first time; a large download where it is not cached) …" >&2
  pip_install "$(grep '^torch==' constraints.txt)"
  echo "Installing ldt-schedules$extra …" >&2
  pip_install --editable ".$extra"
  wanted_stamp >".venv/stamp-$purpose"
  echo "Installed in $((SECONDS - started)) s." >&2
}
