#!/bin/bash
# A TPU pod slice on Google Cloud: the same command on every host. The processes find each other through the metadata
# server; no flags, no addresses. From your own machine:
#
#   NAME=navit ZONE=us-west4-a launch/tpu_pod.sh --config configs/navit_l16.py --workdir /mnt/shared/navit_l16
#
# --workdir must be one folder for all hosts (Filestore, or a bucket mounted with gcsfuse), the code and the data at the
# same paths on each. Before paying: `python train.py --config ... --plan v5e:16x16` says whether it fits.
#
# Made once, with the code on every host:
#   gcloud compute tpus tpu-vm create $NAME --zone $ZONE --spot \
#     --accelerator-type v5litepod-64 --version v2-alpha-tpuv5-lite
#   gcloud compute tpus tpu-vm scp --recurse . $NAME:navit_jax --zone $ZONE --worker=all
#   gcloud compute tpus tpu-vm ssh $NAME --zone $ZONE --worker=all \
#     --command 'pip install -r navit_jax/requirements.txt "jax[tpu]"'
set -euo pipefail

# Status 75: a host was lost (a spot slice that is taken away is gone as a whole: make it anew, start this again).
# The same command resumes from the last checkpoint.
exec gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all \
  --command "cd navit_jax && python train.py $(printf '%q ' "$@")"
