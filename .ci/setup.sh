#!/usr/bin/env bash
# Creates .venv, installs sb3_dsrl with the versions of constraints.txt, and makes sure that SAPIEN finds a Vulkan
# device. `make setup` calls it; running it again repairs and re-uses what is there.
#   PYTHON=python3.11 .ci/setup.sh   chooses the interpreter of a new .venv
# PyPI's torch for Linux comes with CUDA (some GB). For the CPU-only one, set beforehand:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
set -euo pipefail
cd "$(dirname "$0")/.."
venv_python=.venv/bin/python

. .ci/venv.sh

# ---- 1. Python and .venv ---------------------------------------------------------------------------------------
make_venv .venv

# ---- 2. Packages -----------------------------------------------------------------------------------------------
say "installing sb3_dsrl and its dependencies (the first time takes some minutes)"
"$venv_python" -m pip install -c constraints.txt -e '.[maniskill,demos,dev]'

# ---- 3. A Vulkan device ----------------------------------------------------------------------------------------
# ManiSkill needs one even for state observations; Mesa's lavapipe is one for the CPU. Only creating a renderer tells
# whether it works: sapien.Device("cpu").can_render() is False even where rendering works.
render_error=
can_render() {
    render_error=$("$venv_python" -W ignore -c \
        "import cv2, mplib, sapien.render; sapien.render.RenderSystem('$1')" 2>&1 >/dev/null) && return
    render_error=${render_error##*$'\n'} # the last line is the exception
    return 1
}

# Prints the commands that install Mesa and the libraries which the sapien and opencv wheels expect; $1 is a prefix
# such as "sudo ".
mesa_commands() {
    local target=
    if grep -qs '^VERSION_CODENAME=bookworm' /etc/os-release; then # its own Mesa is too old
        target="-t bookworm-backports "
        apt-get indextargets 2>/dev/null | grep -q bookworm-backports ||
            echo "echo 'deb http://deb.debian.org/debian bookworm-backports main' |" \
                "${1}tee /etc/apt/sources.list.d/bookworm-backports.list"
    fi
    echo "${1}apt-get update"
    echo "${1}apt-get install -y --no-install-recommends ${target}mesa-vulkan-drivers libvulkan1" \
        "libgl1 libglib2.0-0 libx11-6"
}

install_mesa() {
    local command
    mesa_commands "" | while IFS= read -r command; do
        # Go on after a failure: another, unreachable package source makes apt-get update fail.
        DEBIAN_FRONTEND=noninteractive bash -c "$command" </dev/null >&2 || say "this failed: $command"
    done
}

if ! can_render cpu; then
    say "SAPIEN finds no Vulkan device for the CPU ($render_error)"
    installed=no
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing Mesa's software renderer"
        install_mesa
        installed=yes
    fi
    if can_render cpu; then
        :
    elif (can_render cuda); then # a subshell, so that render_error stays the one for the CPU
        say "only the GPU can render here: use render_backend=\"gpu\""
    elif [ $installed = yes ]; then
        mesa=$(dpkg-query -W -f '${Version}' mesa-vulkan-drivers 2>/dev/null) || mesa="none"
        for variable in VK_DRIVER_FILES VK_ICD_FILENAMES; do
            [ -z "${!variable:-}" ] || say "note: $variable is set to ${!variable}"
        done
        fail "SAPIEN still finds no Vulkan device ($render_error): it needs Mesa 24.3 or newer, installed is: $mesa"
    elif command -v apt-get >/dev/null; then
        fail "a software renderer for Vulkan is missing and needs root rights; run these commands and then make" \
            "again:"$'\n'"$(mesa_commands "sudo ")"
    else
        fail "install Mesa 24.3 or newer with its Vulkan software renderer (lavapipe), and then run make again"
    fi
fi
say "done"
