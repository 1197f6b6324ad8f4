#!/usr/bin/env bash
# Makes sure of what pip cannot install: Python with venv, its headers, a C++ compiler, make.
# As root on Debian or Ubuntu, what is missing is installed. Otherwise it is said what is missing and what follows;
# only without venv is there no way on (exit status 1).
set -euo pipefail
export PYTHON="${PYTHON:-python3}"

say() { printf 'setup-system: %s\n' "$*" >&2; }

# The Debian packages that are missing, one a line.
missing() {
    command -v make >/dev/null || echo make
    if ! command -v "$PYTHON" >/dev/null; then
        printf '%s\n' python3-venv python3-dev g++
        return
    fi
    "$PYTHON" - <<'EOF'
import os, shutil, sys, sysconfig
from importlib.util import find_spec

python = "python%d.%d" % sys.version_info[:2]
if not (find_spec("venv") and find_spec("ensurepip")):
    print(python + "-venv")
if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
    print(python + "-dev")
compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
if not shutil.which(compiler.split()[0]):
    print("g++")
EOF
}

packages=$(missing)
if [ -n "$packages" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing" $packages
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends $packages; } </dev/null >/dev/null ||
        say "apt-get failed"
    hash -r
    packages=$(missing)
fi

case $packages in
*-venv*)
    say "\`$PYTHON -m venv\` does not work here. Install it; on Debian and Ubuntu: apt-get install" $packages
    exit 1
    ;;
*g++* | *-dev*)
    say "not found:" $packages
    say "The C++ kernels and their tests are skipped; the slower Numba and NumPy kernels are used instead."
    ;;
esac

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    say "The development environment needs Python 3.11 or newer, and $PYTHON is" \
        "$("$PYTHON" -c 'import platform; print(platform.python_version())'). Name another: make PYTHON=python3.12 ..."
    exit 1
fi

# A real S3 server for the tests. Without it they use the moto emulator or are skipped, and say so.
if ! command -v radosgw >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing radosgw ceph-mon ceph-osd openssl (the S3 server that the tests talk to)"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends radosgw ceph-mon ceph-osd openssl; } </dev/null >/dev/null ||
        say "apt-get failed: tests against S3 will be skipped"
elif ! command -v radosgw >/dev/null; then
    say "radosgw is not installed: tests against S3 are skipped (apt-get install radosgw ceph-mon ceph-osd)"
fi
