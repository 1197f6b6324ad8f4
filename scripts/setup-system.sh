#!/usr/bin/env bash
# Makes sure of what pip cannot install: Python with venv, its headers, a C++ compiler, make.
# As root on Debian or Ubuntu, what is missing is installed. Otherwise it is said what is missing and what follows;
# only without venv is there no way on (exit status 1). So too with the S3 server of the tests, which is only wished for.
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

# The Debian packages that the tests of S3 want: Ceph's gateway as a real server on loopback, openssl for its certificate.
missing_for_s3() {
    command -v radosgw >/dev/null && command -v radosgw-admin >/dev/null || echo radosgw
    command -v ceph-mon >/dev/null || echo ceph-mon
    command -v ceph-osd >/dev/null || echo ceph-osd
    command -v openssl >/dev/null || echo openssl
}

# What tests over a link with a limited rate and a delay want; they need root and Linux, too.
missing_for_links() {
    command -v ip >/dev/null && command -v tc >/dev/null || echo iproute2
    command -v iptables-legacy >/dev/null || echo iptables
}

# What tests of the C++ sources want: clang for the fuzzers, qemu and a cross compiler for ARM.
missing_for_native() {
    command -v clang++ >/dev/null || echo clang
    command -v qemu-aarch64 >/dev/null || echo qemu-user
    command -v aarch64-linux-gnu-g++ >/dev/null || echo g++-aarch64-linux-gnu
    # The fuzzers' run-time library is a package of its own, named after clang's version.
    local version
    version=$( (clang++ --version 2>/dev/null || apt-cache depends clang 2>/dev/null) | grep -oE '(version |clang-)[0-9]+' | grep -oE '[0-9]+' | head -n 1)
    [ -z "$version" ] || [ -n "$(find /usr/lib/llvm-"$version"/lib/clang -name 'libclang_rt.fuzzer-*.a' 2>/dev/null | head -n 1)" ] ||
        echo "libclang-rt-$version-dev"
}

# install PACKAGE...: true if apt-get may be used and says that it worked.
install() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    say "installing" "$@"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"; } </dev/null >/dev/null ||
        { say "apt-get failed"; return 1; }
}

packages=$(missing)
if [ -n "$packages" ] && install $packages; then
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

# A real S3 server for the tests: about 60 MB to fetch, 270 MB on the disk. FASTCKPT_TEST_S3=none: not wanted.
if [ "${FASTCKPT_TEST_S3:-}" != none ]; then
    packages=$(missing_for_s3)
    if [ -n "$packages" ] && install $packages; then
        hash -r
        packages=$(missing_for_s3)
    fi
    if [ -n "$packages" ]; then
        say "not found:" $packages
        say "The tests of S3 use the moto emulator or are skipped. On Debian and Ubuntu:" \
            "apt-get install --no-install-recommends" $packages
    fi
fi

# Nobody but root can use them.
if [ "$(id -u)" = 0 ]; then
    packages=$(missing_for_links)
    if [ -n "$packages" ] && install $packages; then
        hash -r
        packages=$(missing_for_links)
    fi
    if [ -n "$packages" ]; then
        say "not found:" $packages
        say "The tests over a shaped link are skipped. On Debian and Ubuntu:" \
            "apt-get install --no-install-recommends" $packages
    fi
fi

# About 250 MB to fetch. FASTCKPT_TEST_NATIVE=none: not wanted.
if [ "${FASTCKPT_TEST_NATIVE:-}" != none ]; then
    packages=$(missing_for_native)
    if [ -n "$packages" ] && install $packages; then
        hash -r
        packages=$(missing_for_native)
    fi
    if [ -n "$packages" ]; then
        say "not found:" $packages
        say "Fuzzers and the tests on an emulated ARM processor are skipped. On Debian and Ubuntu:" \
            "apt-get install --no-install-recommends" $packages
    fi
fi
