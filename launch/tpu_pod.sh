#!/usr/bin/env bash
# One run on all workers of a Cloud TPU slice: the same command on each, which finds its peers by itself.
#
#   launch/tpu_pod.sh NAME ZONE DIRECTORY COMMAND...
#   launch/tpu_pod.sh my-v5p us-east5-a jaxtax .venv/bin/jaxtax train CONFIG out=/mnt/runs/first
#
# DIRECTORY is where each worker has its copy of this repository, with .venv in it, relative to the home there.
# `out` is a directory that all workers share at the same place: a file server, or a bucket that each of them has
# mounted. gs://... is no directory.
#
# A worker whose command saved its state and left (exit code 75), stood still (42), lost another worker (134) or
# was killed (137) starts it again, at most JAXTAX_MAX_RESTARTS times (100 if unset); the others end with such a
# code, too, and they meet again. Any other code ends it. After the slice itself was taken away, run this again on
# the new one: the run goes on from its newest state.
#
# A connection that is lost takes the run along: start this in tmux, on a machine that stays on.
set -euo pipefail

if (($# < 4)); then
  echo "usage: launch/tpu_pod.sh NAME ZONE DIRECTORY COMMAND..." >&2
  exit 2
fi
name=$1 zone=$2
printf -v directory '%q' "$3"
shift 3
printf -v command '%q ' "$@"

# shellcheck disable=SC2016 # code and left are the worker's
{
  printf -v remote 'cd %s || exit 2; left=%d; ' "$directory" "${JAXTAX_MAX_RESTARTS:-100}"
  remote+="while :; do $command; "'code=$?; case $code in 42|75|134|137) ;; *) exit $code ;; esac; '
  remote+='[ $left -gt 0 ] || exit $code; left=$((left - 1)); echo "ended with $code; starting again" >&2; done'
}
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$remote"
