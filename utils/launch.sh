# Sourced by the run scripts with their arguments: [METHOD] [REGULARIZER] [further flags of main_cssl.py], default moco pnr. Sets
# DATA, OUT (empty if not given), METHOD, REGULARIZER, GPUS and FLAGS, goes to the repository's root, and defines `fail` and `launch`.
# TORCHRUN: flags of torchrun for several machines (slurm/cssl.sbatch sets them).
SCRIPT=$(basename "$0")
fail() { echo "$SCRIPT: error: $1" >&2; exit 2; }

# relative folders are those of the caller
case ${DATA:=datasets} in datasets|/*) ;; *) DATA=$PWD/$DATA ;; esac
case ${OUT:=} in ""|/*) ;; *) OUT=$PWD/$OUT ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
METHOD=moco REGULARIZER=pnr GPUS=${GPUS:-1}
if [[ $# -gt 0 && $1 != -* ]]; then METHOD=$1; shift; fi
if [[ $# -gt 0 && $1 != -* ]]; then REGULARIZER=$1; shift; fi
FLAGS=("$@")
[[ $GPUS =~ ^[1-9][0-9]*$ ]] || fail "GPUS=$GPUS is not a number of processes"

# launch [flags]: main_cssl.py with them, on GPUS processes; the caller's own flags come last, and win
launch() {
  source utils/python.sh requirements.txt
  local command=("$PYTHON")
  if [ "$GPUS" -gt 1 ] || [ -n "${TORCHRUN:-}" ]; then
    # shellcheck disable=SC2206
    command+=(-m torch.distributed.run ${TORCHRUN:---standalone} --nproc_per_node "$GPUS"
              --signals_to_handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1) # so that SIGUSR1, too, reaches the processes
  fi
  exec "${command[@]}" main_cssl.py --data_dir "$DATA" --backbone resnet18 --method "$METHOD" --regularizer "$REGULARIZER" "$@" \
    --out_dir "$OUT" ${FLAGS[@]+"${FLAGS[@]}"}
}
