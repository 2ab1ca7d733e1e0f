#!/usr/bin/env bash
# Different data sets in a row, where forgetting shows on a CPU: CIFAR-100, then scikit-learn's digits, then further sets, if named; a
# finished sequence grows by the next set. Ends in the report: RUNS/report.
#   DATA=DIR bash run_sequence.sh [SEED ...]        CIFAR-100 in torchvision's files, or train/<class>/ and test/<class>/; seeds 5 6 7
#   SETS="svhn:DIR folder:DIR"   further sets;  EPOCHS="3 60 ..."  of each set (the first 3, the others 60);  JOINT=5  of joint training
#   METHOD=moco  REGULARIZERS="finetune cassle pnr joint"  RUNS=DIR (runs/sequence)  FLAGS="..." of main_cssl.py  PYTHON=...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/python.sh"
need torch || fail "no python with PyTorch: activate an environment that has it, or let bash run_quickstart.sh make .venv"
RUNS=${RUNS:-runs/sequence} METHOD=${METHOD:-moco}
ALL=("cifar100:${DATA:-datasets}" digits ${SETS:-})
read -ra EPOCHS <<< "${EPOCHS:-3 60}"
read -ra EXTRA <<< "${FLAGS:-}"
[ "$METHOD" = moco ] && EXTRA=(--moco_queue_size 4096 ${EXTRA[@]+"${EXTRA[@]}"})  # most of the time with the papers' 65,536

# train NAME NUMBER_OF_SETS [flags]
train() {
  echo "== $1"
  "$PYTHON" "$ROOT/main_cssl.py" --out_dir "$RUNS/$1" --method "$METHOD" --sequence "${ALL[@]:0:$2}" --seed "$seed" --backbone resnet10 \
    --width 16 --image_size 16 --batch_size 128 --eval knn "${@:3}" ${EXTRA[@]+"${EXTRA[@]}"}
}

for seed in ${*:-5 6 7}; do
  train "first-seed$seed" 1 --regularizer finetune --epochs "${EPOCHS[0]}"
  for regularizer in ${REGULARIZERS:-finetune cassle pnr joint}; do
    if [ "$regularizer" = joint ]; then
      train "joint-${#ALL[@]}sets-seed$seed" ${#ALL[@]} --regularizer finetune --num_tasks 1 --epochs "${JOINT:-5}"
      continue
    fi
    before=first-seed$seed
    for ((count = 2; count <= ${#ALL[@]}; count++)); do
      name=$regularizer-${count}sets-seed$seed
      train "$name" "$count" --regularizer "$regularizer" --init_from "$RUNS/$before" --epochs "${EPOCHS[count - 1]:-60}"
      before=$name
    done
  done
done
shopt -s nullglob
report "$RUNS"/*-${#ALL[@]}sets-seed* --text --out "$RUNS/report"
