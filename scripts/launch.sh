# Sourced by the run scripts with their arguments: [METHOD] [REGULARIZER] [further flags of main_cssl.py], default moco pnr. Sets
# METHOD, REGULARIZER, GPUS and FLAGS, and defines `launch`. Relative paths are the caller's.
# TORCHRUN: flags of torchrun for several machines (slurm/cssl.sbatch sets them).
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
need torch || fail "no python with PyTorch: activate an environment that has it, or let bash run_quickstart.sh make .venv"
METHOD=moco REGULARIZER=pnr GPUS=${GPUS:-1}
if [[ $# -gt 0 && $1 != -* ]]; then METHOD=$1; shift; fi
if [[ $# -gt 0 && $1 != -* ]]; then REGULARIZER=$1; shift; fi
FLAGS=("$@")
[[ $GPUS =~ ^[1-9][0-9]*$ ]] || fail "GPUS=$GPUS is not a number of processes"

# launch [flags]: main_cssl.py with them, on GPUS processes; the caller's own flags come last, and win
launch() {
  local command=("$PYTHON") hangup=,SIGHUP
  if [ "$GPUS" -gt 1 ] || [ -n "${TORCHRUN:-}" ]; then
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # processes that are started again meet anew
    [ -z "$(trap -p HUP)" ] || hangup= # ignored, as under nohup
    # shellcheck disable=SC2206
    command+=(-m torch.distributed.run ${TORCHRUN:---standalone} --nproc_per_node "$GPUS"
              --signals_to_handle SIGTERM,SIGINT,SIGQUIT,SIGUSR1$hangup) # so that SIGUSR1, too, reaches the processes
  fi
  exec "${command[@]}" "$ROOT/main_cssl.py" --data_dir "${DATA:-datasets}" ${OUT:+--out_dir "$OUT"} --backbone resnet18 \
    --method "$METHOD" --regularizer "$REGULARIZER" ${REFERENCE:+--single_tasks} "$@" ${FLAGS[@]+"${FLAGS[@]}"}
}
