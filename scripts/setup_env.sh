# Sourced by the other scripts: an environment with fedsim in it. Uses the active one, else makes .venv; does nothing
# when this checkout, setup.py and constraints.txt are those of the last installation.
if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -x .venv/bin/python ] || "$(command -v python3.11 || command -v python3)" -m venv .venv
  . .venv/bin/activate
fi
stamp="$VIRTUAL_ENV/.fedsim-stamp"
wanted="$PWD $(cat setup.py constraints.txt | cksum)"
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
  echo "installing fedsim and its dependencies into $VIRTUAL_ENV (the first time takes some minutes)"
  # torch first and alone: a build without CUDA that is already there, or that pip is pointed to, is kept.
  python -m pip install -qq --disable-pip-version-check -c constraints.txt torch
  python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[search,privacy,dev]"
  echo "$wanted" >"$stamp"
fi
