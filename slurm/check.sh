#!/usr/bin/env bash
# Checks the nodes of the allocation that it is called in (salloc, or a batch script): `fd-scale check --cluster` runs it.
#   bash slurm/check.sh RECIPE [key=value ...]
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_once check --cluster "$@"
