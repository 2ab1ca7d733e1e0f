#!/usr/bin/env bash
# A table of the papers: runs what is missing of it, goes on after an interruption, and ends in the report.
#   bash run_table.sh cifar100|imagenet100|domainnet|ablation|queue [SEED ...]        default seeds: 5 6 7
#   METHODS="moco byol" REGULARIZERS="finetune cassle pnr joint"   what to cross (all)
#     ablation (MoCo, BYOL; PNR): pseudo-negatives in main, reg, both, none; lambda_neg; teacher_bn.  queue (MoCo; PNR): SIZES
#   RUNS=DIR   where the run folders lie (runs/TABLE); the report goes to RUNS/report
#   DATA, GPUS, TASKS, SCENARIO, PYTHON   as for the run scripts; FLAGS="..."  further flags of main_cssl.py for every run
#   REFERENCE=1  also trains each task alone, for plasticity (but of queue)
#   SMOKE=1    all of it on tiny digits, in minutes
# TABLE=cifar100 SEEDS="5 6 7" sbatch slurm/cssl.sbatch runs the same cells as a job array, a job for each method and seed.
# A method's first task is trained once for each seed, by fine-tuning; the others start from it. A cell that fails is named at the
# end, with status 1; the same command tries it again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/python.sh"
need torch || fail "no python with PyTorch: activate an environment that has it, or let bash run_quickstart.sh make .venv"
TABLE=${1:-}
case $TABLE in
  cifar100|imagenet100|domainnet) SCRIPT=run_$TABLE.sh ;;
  ablation)                       SCRIPT=run_cifar100.sh METHODS=${METHODS:-moco byol} ;;
  queue)                          SCRIPT=run_cifar100.sh METHODS=moco ;;
  *) fail "choose a table: cifar100, imagenet100, domainnet, ablation or queue" ;;
esac
shift
[[ " $* " =~ ^[\ 0-9]*$ ]] || fail "seeds are numbers, not $*"
SEEDS=${*:-5 6 7} RUNS=${RUNS:-runs/$TABLE} FAILED=()
read -ra EXTRA <<< "${FLAGS:-}"
export PYTHON
PLASTICITY=${REFERENCE:-} running='' stopped=''
unset REFERENCE
for signal in HUP INT TERM USR1; do # the run saves and leaves
  # shellcheck disable=SC2064
  trap "stopped=yes; kill -$signal \$running 2> /dev/null || exit 130" $signal
done

# cell NAME METHOD REGULARIZER [flags]: one run, unless it has ended well before, with the same settings
cell() {
  local name=$1 method=$2 regularizer=$3 status=0 small=() settings
  shift 3
  settings="${SMOKE:-} ${TASKS:-} ${SCENARIO:-} ${FLAGS:-} $*"
  [ "$settings" != "$(cat "$RUNS/$name/.complete" 2> /dev/null || echo none)" ] || return 0
  if [ -n "${SMOKE:-}" ]; then
    small=(${SMALL[@]+"${SMALL[@]}"} --dataset digits --scenario class --num_tasks "${TASKS:-5}" --backbone resnet10 --width 8 --image_size 8 --epochs 1
            --batch_size 32 --optimizer adam --lr 1e-3 --eval knn --online_probe off --device cpu)
  fi
  echo "== $name"
  OUT=$RUNS/$name bash "$ROOT/$SCRIPT" "$method" "$regularizer" ${small[@]+"${small[@]}"} --seed "$seed" "$@" ${EXTRA[@]+"${EXTRA[@]}"} &
  running=$!
  while wait "$running" || status=$?; kill -0 "$running" 2> /dev/null; do status=0; done # a signal ends `wait` early
  running=
  [ -z "$stopped" ] || exit "$status"
  if [ "$status" -eq 0 ]; then echo "$settings" > "$RUNS/$name/.complete"; else FAILED+=("$name (status $status)"); fi
}

for seed in $SEEDS; do
  for method in ${METHODS:-moco simclr byol vicreg barlow falcon}; do
    [ -z "${SMOKE:-}" ] || read -ra SMALL <<< "$(cd "$ROOT" && "$PYTHON" -c "from losses import find; print(find('$method').small)" 2> /dev/null)"
    id=$method-seed$seed alone=() first=(--init_from "$RUNS/finetune-$id/task0.pt")
    if [ "$TABLE" = queue ]; then # another queue, another first task
      for size in ${SIZES:-4096 16384 65536}; do cell "pnr-queue$size-$id" "$method" pnr --moco_queue_size "$size"; done
      continue
    fi
    if [ -n "$PLASTICITY" ]; then
      REFERENCE=1 cell "single-$id" "$method" finetune
      alone=(--reference "$RUNS/single-$id")
      first+=("${alone[@]}")
    fi
    cell "finetune-$id" "$method" finetune ${alone[@]+"${alone[@]}"}
    if [ "$TABLE" = ablation ]; then
      cell "pnr-$id" "$method" pnr "${first[@]}"
      cell "pnr-none-$id" "$method" pnr "${first[@]}" --pnr_pseudo_negatives none
      cell "pnr-teacher-eval-$id" "$method" pnr "${first[@]}" --teacher_bn eval
      case $method in
        moco|simclr) for which in main reg; do cell "pnr-$which-$id" "$method" pnr "${first[@]}" --pnr_pseudo_negatives $which; done ;;
        *) for weight in 0.1 0.3 1 3; do cell "pnr-lambda$weight-$id" "$method" pnr "${first[@]}" --"${method}"_lambda_neg $weight; done ;;
      esac
      continue
    fi
    for regularizer in ${REGULARIZERS:-finetune cassle pnr joint}; do
      case $regularizer in
        finetune) ;;
        joint) TASKS=1 cell "joint-$id" "$method" finetune --num_tasks 1 ;;
        *)     cell "$regularizer-$id" "$method" "$regularizer" "${first[@]}" ;;
      esac
    done
  done
done
report "$RUNS"/*-seed* --text --out "$RUNS/report" || FAILED+=("the report")
if [ ${#FAILED[@]} -gt 0 ]; then printf 'failed: %s\n' "${FAILED[@]}" >&2; exit 1; fi
