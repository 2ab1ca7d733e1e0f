#!/usr/bin/env bash
# The main job in miniature, in about two minutes on two CPU cores: five tasks of scikit-learn's handwritten digits, MoCo v2+,
# fine-tuning first and then PNR from the same first task. It shows the machinery; digits are too easy to show forgetting.
#   bash run_quickstart.sh [further flags of main_cssl.py]
#   OUT=DIR: where the two run folders go (runs/quickstart); PYTHON=...: an interpreter (python, if it has the packages, or else
#   that of .venv, which is made)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/python.sh"
need torch torchvision tqdm tensorboard sklearn matplotlib || install requirements.txt
OUT=${OUT:-runs/quickstart}

SETTINGS=(--dataset digits --num_tasks 5 --image_size 16 --backbone resnet10 --width 16 --epochs 25 --warmup_epochs 10 --batch_size 64 --lr 0.1
          --method moco --moco_queue_size 256 --moco_ema 0.999 0.999)

"$PYTHON" "$ROOT/main_cssl.py" "${SETTINGS[@]}" --regularizer finetune --out_dir "$OUT/finetune" "$@"
"$PYTHON" "$ROOT/main_cssl.py" "${SETTINGS[@]}" --regularizer pnr --init_from "$OUT/finetune/task0.pt" --out_dir "$OUT/pnr" "$@"
echo
PYTHONPATH=$ROOT "$PYTHON" -m utils.report "$OUT/finetune" "$OUT/pnr" --text
echo "to watch them: $PYTHON -m tensorboard.main --logdir $OUT"
[ "$PYTHON" != "$ROOT/.venv/bin/python" ] || echo "for further commands: source $ROOT/.venv/bin/activate"
