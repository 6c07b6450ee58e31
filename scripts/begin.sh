# shellcheck shell=bash
# Sourced first by the experiments, with the names of variables that hold folders: paths that are relative are of the
# folder where the script is called. From here on it runs in the checkout, installed, with the steps of steps.sh.
for name in "$@"; do
  [[ -z "${!name:-}" || "${!name}" == /* ]] || printf -v "$name" '%s/%s' "$PWD" "${!name}"
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ "${DRY_RUN:-0}" == "1" ]] || bash scripts/setup.sh
# shellcheck source=scripts/steps.sh
source scripts/steps.sh
