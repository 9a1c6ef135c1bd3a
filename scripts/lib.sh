# Sourced by the other scripts: the project's root, its virtual environment, timed stages.
# shellcheck shell=bash

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
PY="$ROOT/.venv/bin/python"
export PIP_DISABLE_PIP_VERSION_CHECK=1

# fingerprint FILE...: changes when one of the files changes or the checkout moves.
fingerprint() {
    "${PYTHON:-python3}" - "$ROOT" "$@" <<'EOF'
import hashlib, pathlib, sys
print(hashlib.sha256(b"".join([sys.argv[1].encode(), *(pathlib.Path(f).read_bytes() for f in sys.argv[2:])])).hexdigest())
EOF
}

# environment NAME: make .venv if it is missing or broken, and install requirements/NAME.txt and the project
# (editable) unless exactly that was installed there before.
environment() {
    local stamp=".venv/.installed-$1" want
    want="$(fingerprint requirements/base.txt "requirements/$1.txt" pyproject.toml)"
    if ! "$PY" -m pip --version >/dev/null 2>&1; then
        echo "making .venv with $("${PYTHON:-python3}" --version)"
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON")'
        "${PYTHON:-python3}" -m venv --clear .venv
    fi
    if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
        echo ".venv has requirements/$1.txt already"
        return
    fi
    rm -f "$stamp"
    echo "installing requirements/$1.txt (torch is large: the first time takes minutes)"
    "$PY" -m pip install --progress-bar off -r "requirements/$1.txt" |
        { grep -v '^Requirement already satisfied' || [ $? -eq 1 ]; }
    "$PY" -m pip install --progress-bar off --quiet --no-deps --no-build-isolation --editable .
    "$PY" -m pip check
    echo "$want" >"$stamp"
}

# own_environment NAME...: make $VENV, an environment that sees no other, with requirements/NAME.txt of the last name unless
# exactly that was installed there before; the names before it are files that it includes.
own_environment() {
    local stamp="$VENV/.installed" name="${!#}" want
    want="$(fingerprint $(printf 'requirements/%s.txt ' "$@"))"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && "$VENV/bin/python" -c '' 2>/dev/null; then
        echo "$(basename "$VENV") has requirements/$name.txt already"
        return
    fi
    rm -f "$stamp"
    echo "making $(basename "$VENV") with $("${PYTHON:-python3}" --version)"
    "${PYTHON:-python3}" -m venv --clear "$VENV"
    echo "installing requirements/$name.txt (torch is large: the first time takes minutes)"
    "$VENV/bin/python" -m pip install --progress-bar off --quiet -r "requirements/$name.txt"
    "$VENV/bin/python" -m pip check
    echo "$want" >"$stamp"
}

# with_stubs ARGUMENT...: run $VENV's Python with CANN's stand-ins, which the loader finds in LD_LIBRARY_PATH. Without the
# first variable `import torch` would load torch_npu; the project itself need not be installed there.
with_stubs() {
    TORCH_DEVICE_BACKEND_AUTOLOAD=0 LD_LIBRARY_PATH="$VENV/cann-stubs${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" \
        PYTHONPATH="$ROOT" "$VENV/bin/python" "$@"
}

# libraries NAME: make $VENV anew, an environment that sees .venv's torch, with requirements/NAME.txt.
libraries() {
    local folder='import sysconfig; print(sysconfig.get_path("purelib"))'
    rm -f "$VENV/.installed"
    echo "making $(basename "$VENV") with requirements/$1.txt"
    "$PY" -m venv --without-pip --clear "$VENV"
    "$PY" -c "$folder" >"$("$VENV/bin/python" -c "$folder")/shared.pth"
    "$PY" -m pip --python "$VENV/bin/python" --no-input install --progress-bar off --quiet --no-deps \
        --no-build-isolation -r "requirements/$1.txt"
}

# no_browser: why there is no Chromium with its driver and none can be installed; nothing where there is one.
# Debian's packages are installed where that is possible.
no_browser() {
    local log
    command -v chromium >/dev/null && command -v chromedriver >/dev/null && return
    if ! command -v apt-get >/dev/null; then
        echo "chromium and chromedriver are not installed, and there is no apt-get"
    elif [ "$(id -u)" -ne 0 ]; then
        echo "chromium and chromedriver are not installed; as root: apt-get install chromium chromium-driver"
    elif ! log="$({ apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        chromium chromium-driver; } 2>&1)"; then
        echo "apt-get cannot install chromium and chromium-driver: $(tail -n 1 <<<"$log")"
    fi
}

STAGE=0
STAGES=0 # how many there will be; set it before the first
SUMMARY=()
FAILED=0

# stage TITLE COMMAND...: run one stage in a shell of its own, show its number and time, remember whether it failed.
# A stage that is itself one of these scripts numbers its own stages below it: [2.1/4].
stage() {
    local title="$1" start="$SECONDS" result=ok
    shift
    STAGE=$((STAGE + 1))
    local number="[${STAGE_OF:-}$STAGE/$STAGES]"
    printf '\n%s %s ...\n' "$number" "$title"
    # Inside `if` and `||` bash ignores errexit, so the stage runs in a subshell whose status is asked for afterwards.
    set +e
    (
        set -e
        export STAGE_OF="${STAGE_OF:-}$STAGE."
        "$@"
    )
    local status=$?
    set -e
    if [ "$status" -ne 0 ]; then
        result="FAILED (exit status $status)"
        FAILED=$((FAILED + 1))
    fi
    printf '%s %s: %s, %d s\n' "$number" "$title" "$result" $((SECONDS - start))
    SUMMARY+=("$(printf '%-44s %5d s  %s' "$title" $((SECONDS - start)) "$result")")
}

# not_run TITLE REASON: a stage that cannot run; it stays visible in the summary.
not_run() {
    STAGE=$((STAGE + 1))
    printf '\n[%s/%d] %s: not run: %s\n' "${STAGE_OF:-}$STAGE" "$STAGES" "$1" "$2"
    SUMMARY+=("$(printf '%-44s %7s  not run: %s' "$1" - "$2")")
}

# finish NAME: print what ran and how long it took; the exit status tells whether anything failed.
finish() {
    printf '\n%s: what ran\n' "$1"
    printf '  %s\n' "${SUMMARY[@]}"
    printf '  %-44s %5d s\n' total "$SECONDS"
    if [ "$FAILED" -ne 0 ]; then
        echo "$FAILED of $STAGE stages FAILED"
        exit 1
    fi
    echo "all passed"
}
