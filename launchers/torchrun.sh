#!/usr/bin/env bash
# One workstation, or several nodes that meet at an address, under torchrun; a failed worker restarts all from the last
# checkpoint.
#
#   launchers/torchrun.sh --config configs/mine.yaml training.max_steps=1000
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launchers/torchrun.sh --config configs/mine.yaml     (on each node)
#
# PROCESSES     workers on this node (default: its GPUs, else 2)
# MAX_RESTARTS  how often a failure may restart the workers (default 3)
# FUSIONTREE_PYTHON  the python to run (default: .venv/bin/python beside the project, else python3)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${FUSIONTREE_PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=python3
if [ -z "${PROCESSES:-}" ]; then
    PROCESSES=$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ "${NNODES:-1}" = 1 ]; then
    where=(--standalone)
else
    : "${MASTER_ADDR:?NNODES is $NNODES: set MASTER_ADDR to the address of the first node}"
    : "${NODE_RANK:?NNODES is $NNODES: set NODE_RANK to the number of this node, from 0}"
    where=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
# A wrong configuration is found here, once, rather than by every worker and every restart.
WORLD_SIZE=1 RANK=0 "$python" -c '
import sys
from fusiontree.config.load import load_config
from fusiontree.train import build_parser
from fusiontree.utils.errors import UserError
try:
    args = build_parser().parse_args(sys.argv[1:])
    load_config(args.config, args.overrides)
except UserError as error:
    sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
' "$@"
exec "$python" -m torch.distributed.run "${where[@]}" --nproc-per-node "$PROCESSES" \
    --max-restarts "${MAX_RESTARTS:-3}" -m fusiontree.train "$@"
