#!/usr/bin/env bash
# Creates .venv-lerobot: sb3_dsrl with LeRobot, gym-pusht and the versions of constraints-lerobot.txt. It is an environment of
# its own because LeRobot needs numpy >= 2, ManiSkill's motion planner numpy < 2. `make test-lerobot` calls it.
# PYTHON and PIP_EXTRA_INDEX_URL do what they do in setup.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
. .ci/venv.sh
venv_python=.venv-lerobot/bin/python

make_venv .venv-lerobot
say "installing sb3_dsrl and LeRobot (the first time takes some minutes, and 5 GB with PyPI's torch)"
"$venv_python" -m pip install -c constraints-lerobot.txt -e '.[lerobot-policies]' pytest pytest-timeout
# gym-pusht brings OpenCV with windows, which needs libGL; LeRobot brings it without. Both write the same files.
"$venv_python" -m pip install -q --no-deps --force-reinstall -c constraints-lerobot.txt opencv-python-headless
"$venv_python" -W ignore -c 'import gym_pusht, lerobot, sb3_dsrl'
say "done"
