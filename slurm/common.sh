# shellcheck shell=bash
# What the batch scripts share: sourced by them on the first node of a job, never run by itself.
#
# A job's life: find the run folder -> start torchrun on every node -> wait. On USR1 (the time limit is near, or the
# job is to be preempted) write RUN/preempt: the ranks agree on it at a step boundary, save and end, and the job is
# requeued. torchrun itself is never signalled: USR1 would kill it, TERM leaves its ranks 30 s. A job that fails is
# requeued too, until it has failed FD_MAX_FAILURES times in a row without a new checkpoint.
set -euo pipefail

FD_SLURM=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
FD_CODE=$(dirname "$FD_SLURM")

say() { printf '%(%H:%M:%S)T slurm: %s\n' -1 "$*" >&2; }

stop() {
  local code=$1
  shift
  say "$*"
  exit "$code"
}

[ -n "${SLURM_JOB_ID:-}" ] || stop 2 "$0 runs inside a job; start it with: sbatch $0, or fd-scale submit RECIPE"

# What `fd-scale submit` was told: FD_PYTHON, FD_GPU, FD_LEAD_S, FD_VERB, FD_EXPORT, FD_CHECK, FD_CLUSTER_ENV.
if [ -r "$FD_SLURM/submitted.env" ]; then
  # shellcheck source=/dev/null
  . "$FD_SLURM/submitted.env"
fi
# The site's values, and nothing else about the site anywhere.
FD_CLUSTER_ENV=${FD_CLUSTER_ENV:-$FD_SLURM/cluster.env}
if [ -r "$FD_CLUSTER_ENV" ]; then
  # shellcheck source=cluster.env.example
  . "$FD_CLUSTER_ENV"
else
  say "no $FD_CLUSTER_ENV: taking defaults; cluster.env.example says what may stand there"
fi

[ -z "${FD_LEAD_S:-}" ] || export FD_LEAD_S # read by fd_scale.cluster.job
# A folder that lies where a job starts must not hide an installed package.
export PYTHONSAFEPATH=1
# A copy that `fd-scale submit` made: its code runs, whatever has become of the code that was submitted.
if [ -e "$FD_CODE/COMMIT" ]; then
  export PYTHONPATH=$FD_CODE${PYTHONPATH:+:$PYTHONPATH}
  say "code of $(cat "$FD_CODE/COMMIT"), from $FD_CODE"
fi
if [ -z "${FD_PYTHON:-}" ]; then
  FD_PYTHON=python3
  [ ! -x "$FD_CODE/.venv/bin/python" ] || FD_PYTHON=$FD_CODE/.venv/bin/python
fi
# A shell that salloc gives runs on the login node, where these are not set.
first_node=${SLURMD_NODENAME:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
# A rank a GPU: SLURM's own count first, since a job may have half a node.
FD_RANKS_PER_NODE=${FD_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-$(srun --nodes=1 --ntasks=1 bash -c 'nvidia-smi --list-gpus 2>/dev/null | wc -l')}}
[ "$FD_RANKS_PER_NODE" -gt 0 ] || FD_RANKS_PER_NODE=1
threads=$((${SLURM_CPUS_ON_NODE:-1} / FD_RANKS_PER_NODE))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
FD_MAX_FAILURES=${FD_MAX_FAILURES:-3}
# One element of an array, by a name that is its alone: the number of one of them also means the whole array.
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
# What fd_scale.lock.slurm_start says of the same start.
FD_START="slurm $SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"

# srun's options and the words before a command that put it into the container, where there is one.
container_options=() container_prefix=()
# What `install` makes must lie on the node's disk: with pyxis each step has a container and a /tmp of its own.
mounts=${FD_WHEELHOUSE:+${FD_LOCAL_DISK:-/tmp}:${FD_LOCAL_DISK:-/tmp},$FD_WHEELHOUSE:$FD_WHEELHOUSE,}
mounts+=${FD_MOUNTS:+$FD_MOUNTS,}$PWD:$PWD,$FD_CODE:$FD_CODE
case ${FD_CONTAINER:+${FD_CONTAINER_KIND:-pyxis}} in
  pyxis)
    container_options=(--container-image="$FD_CONTAINER" --container-workdir="$PWD" --container-mounts="$mounts")
    ;;
  apptainer)
    container_prefix=(apptainer exec --nv --pwd "$PWD" --bind "$mounts" "$FD_CONTAINER")
    ;;
  "") ;;
  *) stop 2 "FD_CONTAINER_KIND: got $FD_CONTAINER_KIND, expected pyxis or apptainer; set it in $FD_CLUSTER_ENV" ;;
esac

# over_image: has pyxis' steps start with the variables of this job. pyxis prefers what the image sets, PYTHONPATH too,
# and makes a rank of each task where the image sets PYTORCH_VERSION, as NVIDIA's do.
over_image() {
  local name
  container_prefix=(env -u RANK -u LOCAL_RANK -u WORLD_SIZE -u MASTER_ADDR -u MASTER_PORT)
  for name in $(compgen -e | grep -E '^(PYTHON|OMP_|NCCL_|GLOO_|TORCH_|HF_)'); do
    container_prefix+=("$name=${!name}")
  done
}

# on_nodes OPTIONS -- COMMAND: one task a node with all of the node's CPUs; torchrun spreads its ranks over them.
on_nodes() {
  local options=()
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
  [ "${#container_options[@]}" = 0 ] || over_image
  # shellcheck disable=SC2086  # options, several words
  srun --ntasks-per-node=1 ${SLURM_CPUS_ON_NODE:+--cpus-per-task=$SLURM_CPUS_ON_NODE} --cpu-bind=none --kill-on-bad-exit=1 \
    ${FD_SRUN_OPTIONS:-} "${options[@]}" "${container_options[@]}" "${container_prefix[@]}" "$@"
}

# on_first_node COMMAND
on_first_node() {
  on_nodes --nodes=1 --ntasks=1 --nodelist="$first_node" -- "$@"
}

# prepare VERB ARGUMENTS: sets run_dir and port; what is wrong with the arguments ends the job here.
prepare() {
  local facts code=0
  facts=$(on_first_node "$FD_PYTHON" -m fd_scale.cluster.job "$@") || code=$?
  case $code in
    0) ;;
    2) stop 2 "not started, and not requeued: see above" ;;
    *)
      [ "${SLURM_RESTART_COUNT:-0}" -ge "$FD_MAX_FAILURES" ] || requeue "$FD_PYTHON does not run here (above)"
      stop 1 "$FD_PYTHON does not run here (above), after $SLURM_RESTART_COUNT restarts: not requeued"
      ;;
  esac
  run_dir=$(tail -n 2 <<<"$facts" | head -n 1)
  port=$(tail -n 1 <<<"$facts")
  mkdir -p "$run_dir/logs"
  # torchrun makes 1 of every code: what the user can mend is written here.
  export FD_ERROR_FILE="$run_dir/logs/error_$SLURM_JOB_ID"
  rm -f "$FD_ERROR_FILE"
  say "run folder $run_dir, $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST) x $FD_RANKS_PER_NODE ranks, start ${FD_START#slurm }"
}

# install: a Python of each node's own from wheels on a shared disk, where cluster.env names a wheelhouse.
install() {
  [ -n "${FD_WHEELHOUSE:-}" ] || return 0
  local target=${FD_LOCAL_DISK:-/tmp}/fd-scale-$SLURM_JOB_ID
  # shellcheck disable=SC2016  # expands on the node
  on_nodes --ntasks="$SLURM_JOB_NUM_NODES" -- bash -c \
    '"$1" -m venv --clear "$2" && "$2/bin/python" -m pip install --quiet --no-index --no-deps "$3"/*.whl' \
    _ "$FD_PYTHON" "$target" "$FD_WHEELHOUSE" || stop 1 "$FD_WHEELHOUSE could not be installed on every node (above)"
  FD_PYTHON=$target/bin/python
}

# ranks VERB ARGUMENTS: the verb on every rank of the job.
ranks() {
  local address logs numa=()
  # What SLURM itself calls the first node by: a name that the other nodes can surely resolve.
  address=${FD_RENDEZVOUS_ADDRESS:-$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')}
  logs=$run_dir/logs/job_${FD_START#slurm }
  [ -z "${FD_NUMA_BINDING:-}" ] || numa=(--numa-binding="$FD_NUMA_BINDING")
  # Each rank's stdout and stderr go to files of their own and to the job's output.
  # shellcheck disable=SC2016  # expands on the node
  on_nodes --ntasks="$SLURM_JOB_NUM_NODES" -- bash -c 'logs=$1/node_$SLURM_NODEID; python=$2; shift 2
    mkdir -p "$logs"
    exec "$python" -m torch.distributed.run --node-rank="$SLURM_NODEID" --log-dir="$logs" --redirects=3 --tee=3 "$@"' \
    _ "$logs" "$FD_PYTHON" --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$FD_RANKS_PER_NODE" \
    --master-addr="$address" --master-port="$port" --rdzv-id="${FD_START#slurm }" "${numa[@]}" -m fd_scale "$@"
}

# seconds_left: until SLURM ends the job; nothing where it has no time limit.
seconds_left() {
  local end
  end=$(scontrol show job "$job" | sed -n 's/.* EndTime=\([^ ]*\).*/\1/p')
  case $end in
    [0-9]*) echo $(($(date -d "$end" +%s) - $(date +%s))) ;;
  esac
}

# insist COMMAND: tries again while it fails, for two minutes: slurmctld may be busy or just restarting.
insist() {
  local pause
  for pause in 5 15 30 60 0; do
    "$@" && return 0
    [ "$pause" = 0 ] || sleep "$pause"
  done
  return 1
}

# requeue REASON
requeue() {
  local state
  # A job that is being cancelled ends its steps too, and is not to come back.
  state=$(insist squeue --noheader --jobs="$job" --format=%T) || state=unknown
  [ "$state" = RUNNING ] || stop 1 "$1; SLURM is ending the job (its state: ${state:-none}): not requeued"
  say "$1: requeued"
  insist scontrol requeue "$job" || stop 75 "SLURM does not requeue this job (above); the same sbatch command resumes"
  sleep 120 # SLURM ends this script
}

on_usr1() {
  [ -z "$signalled" ] || return 0
  say "USR1: the ranks save after this step and the job is requeued"
  signalled=1
  write_preempt
  # Ranks that hang would be lost with the job at its time limit: it is requeued just before, from the last checkpoint.
  local left
  left=$(seconds_left) || left=
  if [ -n "$left" ] && [ "$left" -gt 0 ]; then
    (
      sleep $((left > 20 ? left - 10 : left / 2))
      requeue "no save within the lead before the time limit"
    ) &
    reminder=$!
  fi
}

# Written whole or not at all; the name says for which start, so that no other job takes it for its own.
write_preempt() {
  [ -n "$run_dir" ] || return 0
  echo "$FD_START" >"$run_dir/preempt.tmp"
  mv "$run_dir/preempt.tmp" "$run_dir/preempt"
}

# count_failure: sets `failures`, in a row without a new checkpoint; of this job alone.
count_failure() {
  local whose step count newest
  newest=$(cat "$run_dir/checkpoints/latest" 2>/dev/null || echo none)
  read -r whose step count 2>/dev/null <"$run_dir/logs/failures" || whose=
  if [ "$whose" = "$SLURM_JOB_ID" ] && [ "$step" = "$newest" ]; then
    failures=$((count + 1))
  else
    failures=1
  fi
  echo "$SLURM_JOB_ID $newest $failures" >"$run_dir/logs/failures"
}

# wait_for PID: its exit code, whatever signals come meanwhile.
wait_for() {
  local code
  while :; do
    code=0
    wait "$1" || code=$?
    kill -0 "$1" 2>/dev/null || return "$code"
  done
}

# array_settings: adds the settings of this element to `arguments`.
array_settings() {
  [ -n "${SLURM_ARRAY_TASK_ID:-}" ] && [ -r "$FD_CODE/array" ] || return 0
  local line
  line=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$FD_CODE/array")
  IFS=$'\t' read -r -a settings <<<"$line"
  arguments+=("${settings[@]}")
}

# train_and_requeue VERB RECIPE [key=value ...]: the whole of a training job.
train_and_requeue() {
  local arguments=("$@") code=0
  run_dir='' signalled='' reminder=''
  trap on_usr1 USR1
  [ -n "${2:-}" ] || stop 2 "which recipe? sbatch $1.sbatch RECIPE [key=value ...]"
  array_settings
  declare -F fd_setup >/dev/null && fd_setup
  install
  prepare "${arguments[@]}"
  [ -z "$signalled" ] || write_preempt
  if [ -n "${FD_CHECK:-}" ] && [ -z "${SLURM_RESTART_COUNT:-}" ]; then
    ranks check --cluster "${arguments[@]:1}" || stop 2 "the check of the cluster fails (above): not started, not requeued"
    prepare "${arguments[@]}" # the port that was free then may be taken now
  fi
  ranks "${arguments[@]}" &
  wait_for $! || code=$?
  [ -z "$reminder" ] || kill "$reminder" 2>/dev/null || true
  if [ -s "$FD_ERROR_FILE" ]; then
    stop 2 "not requeued, the same would happen again: $(cat "$FD_ERROR_FILE")"
  fi
  case $code in
    0)
      if [ -e "$run_dir/preempt" ]; then # a run that is complete removes it
        [ "$(cat "$run_dir/preempt")" != "$FD_START" ] || requeue "preempted, saved"
        stop 75 "stopped by $run_dir/preempt, saved: not requeued, the same command resumes"
      fi
      if [ -n "${FD_EXPORT:-}" ]; then
        rm -rf "$FD_EXPORT" # of an earlier run of the same folder
        on_first_node "$FD_PYTHON" -m fd_scale export "$run_dir" "$FD_EXPORT"
      fi
      say "done"
      ;;
    75) requeue "preempted, saved" ;;
    *)
      count_failure
      if [ "$failures" -ge "$FD_MAX_FAILURES" ]; then
        stop 1 "failed $failures times in a row with no checkpoint newer than $(cat "$run_dir/checkpoints/latest" 2>/dev/null || echo none): not requeued; exit code $code, what the ranks said is above and in $run_dir/logs"
      fi
      requeue "failed with exit code $code, $failures of at most $FD_MAX_FAILURES times without a new checkpoint"
      ;;
  esac
}

# run_once VERB ARGUMENTS: a verb on every rank, with nothing to save and nothing to requeue.
run_once() {
  declare -F fd_setup >/dev/null && fd_setup
  install
  prepare "$@"
  ranks "$@"
}
