#!/usr/bin/env bash
# The main job in miniature, in about three minutes on two CPU cores: SimCLR learns scikit-learn's handwritten digits, and then the
# same digits before photographs, by fine-tuning, CaSSLe and PNR. It ends with a table: A_T, the mean over both sets, is higher with
# a regulariser (seeds 5, 6, 7: by 1 to 5 points). S, what the first digits lost, is of 359 images: by chance it may rise or fall by
# points with the seed or the CPU, since so short a run forgets little (docs/RESULTS.md has runs that forget much).
#   bash run_quickstart.sh [further flags of main_cssl.py]       OUT=runs/six bash run_quickstart.sh --seed 6
#   OUT=DIR: where the run folders go (runs/forgetting); PYTHON=...: an interpreter (python, if it has the packages, or else that
#   of .venv, which is made)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/python.sh"
need torch torchvision tqdm tensorboard sklearn matplotlib || install requirements.txt
OUT=${OUT:-runs/forgetting}

SETTINGS=(--method simclr --backbone resnet10 --width 8 --image_size 16 --epochs 30 --batch_size 128 --eval knn --online_probe off)

"$PYTHON" "$ROOT/main_cssl.py" "${SETTINGS[@]}" --regularizer finetune --sequence digits --out_dir "$OUT/digits" "$@"
for regularizer in finetune cassle pnr; do
  "$PYTHON" "$ROOT/main_cssl.py" "${SETTINGS[@]}" --regularizer "$regularizer" --sequence digits textured_digits \
    --init_from "$OUT/digits" --out_dir "$OUT/$regularizer" "$@"
done
echo
report "$OUT/finetune" "$OUT/cassle" "$OUT/pnr" --text
echo "to watch them: $PYTHON -m tensorboard.main --logdir $OUT"
[ "$PYTHON" != "$ROOT/.venv/bin/python" ] || echo "for further commands: source $ROOT/.venv/bin/activate"
