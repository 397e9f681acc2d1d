#!/usr/bin/env bash
# A TPU slice whose hosts are reached by ssh:
#   TPU=my-slice ZONE=us-east5-a \
#     launch/tpu_pod_ssh.sh configs/qwen3_8b_base.py --data.train /shared/dapo-math-17k.parquet --run-dir /shared/runs/a
# The repository lies in FOLDER on every host (or in a folder that all mount), installed there once:
#   gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
#     --command='git clone REPOSITORY rlvr_jax && make -C rlvr_jax setup ACCELERATOR=tpu'
# and the run's folder on a file system that all hosts mount (Filestore, Lustre).
set -uo pipefail
: "${TPU:?}" "${ZONE:?}"
folder=${FOLDER:-rlvr_jax}
recipe=${1:?which recipe? launch/tpu_pod_ssh.sh configs/NAME.py [flags of python -m train]}
shift

command="cd $(printf '%q' "$folder") && exec .venv/bin/python -m train \
--config $(printf '%q ' "$recipe" "$@") --distributed.auto"

# gcloud does not hand on the exit code of a worker reliably, so the restart is decided on each host: after 69 (another
# process was lost) and 75 (asked to end) the same command runs again, where all meet anew. `exec` above keeps signals
# and codes those of the program.
again="for attempt in \$(seq ${RESTARTS:-20}); do bash -c $(printf '%q' "$command"); code=\$?; \
case \$code in 69|75) sleep 10 ;; *) exit \$code ;; esac; done; exit \$code"

exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$again"
