#!/usr/bin/env bash
# One run in several processes on this machine, each with its own devices: GPUs, or fake devices on a CPU.
#
#   launch/local.sh PROCESSES DEVICES COMMAND...
#   launch/local.sh 2 4 jaxtax train configs/tiny/train.yaml mesh.fsdp=8                    # eight GPUs
#   JAX_PLATFORMS=cpu launch/local.sh 2 4 jaxtax train configs/tiny/train.yaml mesh.fsdp=8  # no GPU
#
# With CUDA_VISIBLE_DEVICES set, the processes share the GPUs that it lists. TERM and Ctrl-C are passed on, so that
# every process saves. Exits with 75 when they all left to be started again, with 0 when all are done, else with
# the code of the first that failed, which ends the others: they get TERM, and after JAXTAX_LOCAL_PATIENCE seconds
# (10) KILL. Nothing is started again; the same command goes on from the newest state.
set -euo pipefail

if (($# < 3)) || ! [[ $1$2 =~ ^[0-9]+$ ]] || (($1 < 1 || $2 < 1)); then
  echo "usage: launch/local.sh PROCESSES DEVICES COMMAND..." >&2
  exit 2
fi
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
  echo "launch/local.sh needs bash 5.1 or later; found $BASH_VERSION" >&2
  exit 2
fi
processes=$1 devices=$2
shift 2

again=75
patience=${JAXTAX_LOCAL_PATIENCE:-10} # seconds that the others have once one has failed
if ! [[ $patience =~ ^[0-9]+$ ]]; then
  echo "JAXTAX_LOCAL_PATIENCE='$patience'; expected a whole number of seconds" >&2
  exit 2
fi
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAXTAX_COORDINATOR=127.0.0.1:$port JAXTAX_NUM_PROCESSES=$processes

visible=()
if [[ ${JAX_PLATFORMS:-} != cpu ]]; then
  IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES-$(seq -s, 0 $((processes * devices - 1)))}"
  if ((${#visible[@]} < processes * devices)); then
    echo "$processes x $devices GPUs are wanted; CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-} has ${#visible[@]}" >&2
    exit 2
  fi
fi

declare -A running=() # the processes that have not ended, by their ids
leaving=0 left_again=0
pass_on() {
  leaving=1
  mapfile -t started < <(jobs -p) # one may just have been started that is not in `running` yet
  kill -TERM "${started[@]}" 2>/dev/null || true
}
trap pass_on TERM INT

for ((id = 0; id < processes; id++)); do
  if ((leaving)); then # those that are there would wait for the others
    left_again=1
    break
  fi
  settings=("JAXTAX_PROCESS_ID=$id")
  if [[ ${JAX_PLATFORMS:-} == cpu ]]; then
    settings+=("XLA_FLAGS=${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices")
  else
    settings+=("CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${visible[*]:id * devices:devices}")")
  fi
  env "${settings[@]}" "$@" &
  running[$!]=1
done

failed=0
while ((${#running[@]})); do
  code=0
  wait -n -p ended "${!running[@]}" 2>/dev/null || code=$?
  if [[ -z ${ended:-} ]]; then # a signal came, and was passed on; who ended meanwhile is "no such job" now
    for ended in "${!running[@]}" ''; do
      kill -0 "$ended" 2>/dev/null || break
    done
    [[ -n $ended ]] || continue
    code=0
    wait "$ended" || code=$?
  fi
  unset "running[$ended]"
  if ((code == again)); then
    left_again=1
  elif ((code != 0 && failed == 0)); then
    failed=$code
    echo "process $ended ended with $code; the others have $patience s" >&2
    (sleep "$patience" && kill -KILL "${!running[@]}") >/dev/null 2>&1 &
    killer=$!
    disown "$killer"
    pass_on
  fi
done

if ((failed)); then
  kill "$killer" 2>/dev/null || true
  exit "$failed"
fi
exit $((left_again ? again : 0))
