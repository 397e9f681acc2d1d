#!/usr/bin/env bash
# A TPU slice of a GKE cluster made by xpk (https://github.com/AI-Hypercomputer/xpk):
#   CLUSTER=mine PROJECT=my-project ZONE=us-east5-a STORAGE=shared IMAGE=REGISTRY/rlvr:1 \
#     launch/xpk.sh configs/qwen3_8b_base.py --data.train /shared/dapo-math-17k.parquet --run-dir /shared/runs/first
# IMAGE holds the repository in /rlvr, installed by `make setup ACCELERATOR=tpu`. STORAGE is a file system that all
# pods share, mounted at a folder of your choice (here /shared), made once by
#   xpk storage create shared --type=gcpfilestore --mount-point=/shared --readonly=false --auto-mount=false \
#     --size=2560 --tier=BASIC_SSD --access_mode=ReadWriteMany --vol=default --cluster=... --project=... --zone=...
set -euo pipefail
: "${CLUSTER:?}" "${PROJECT:?}" "${ZONE:?}" "${STORAGE:?}" "${IMAGE:?}"
recipe=${1:?which recipe? launch/xpk.sh configs/NAME.py [flags of python -m train]}
shift

# xpk starts again for codes 42 and 127 to 255 by itself; 69 and 75 are this program's "run me again".
exec xpk workload create \
    --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
    --workload="${WORKLOAD:-rlvr-$(date +%m%d-%H%M)}" \
    --tpu-type="${TPU_TYPE:-v5p-128}" --num-slices=1 \
    --docker-image="$IMAGE" --storage="$STORAGE" \
    --max-restarts=50 --restart-on-exit-codes=69,75 --termination-grace-period-seconds=600 \
    --command="cd /rlvr && exec .venv/bin/python -m train --config $(printf '%q ' "$recipe" "$@")"
