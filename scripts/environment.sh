# Sourced by the other scripts: makes .venv in the repository and installs the project into it, if need be.
#
#   prepare EXTRA     EXTRA is "" or "[test]"
#
# A stamp remembers what was installed from which files, so that a second call returns at once.

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

find_python() {
  local candidate
  for candidate in python3.12 python3.11 python3.10 python3.13 python3; do
    if command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "No Python 3.10 or newer was found; install one (on Debian: apt-get install python3 python3-venv)." >&2
  return 1
}

prepare() {
  local extra="$1" stamp wanted python
  cd "$repository"
  stamp=".venv/installed$extra"
  wanted="$(cat pyproject.toml constraints.txt | cksum)"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    return
  fi
  python="$(find_python)"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  echo "Installing into .venv (torch first; the first time this takes a few minutes) …" >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$(grep '^torch==' constraints.txt)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$extra"
  echo "$wanted" >"$stamp"
}
