#!/usr/bin/env bash
# One run on all workers of a Cloud TPU slice: the same command on each, which finds its peers by itself.
#
#   launch/tpu_pod.sh NAME ZONE DIRECTORY COMMAND...
#   launch/tpu_pod.sh my-v5p us-east5-a jaxtax .venv/bin/jaxtax train CONFIG out=gs://bucket/first
#
# DIRECTORY is where each worker has its copy of this repository, with .venv in it, relative to the home there.
# A worker that saved its state and left (exit code 75) is started again at once; any other code ends it.
# After the slice itself was taken away, run this again on the new one: the run goes on from its state.
set -euo pipefail

if (($# < 4)); then
  echo "usage: launch/tpu_pod.sh NAME ZONE DIRECTORY COMMAND..." >&2
  exit 2
fi
name=$1 zone=$2
printf -v directory '%q' "$3"
shift 3
printf -v command '%q ' "$@"

# shellcheck disable=SC2016 # $? is the worker's
printf -v remote 'cd %s && while :; do %s; code=$?; [ $code -eq 75 ] || exit $code; done' "$directory" "$command"
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$remote"
