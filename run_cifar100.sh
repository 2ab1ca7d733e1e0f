#!/usr/bin/env bash
# CIFAR-100, class-incremental, with the paper's settings (ResNet-18, 500 epochs a task).
#   bash run_cifar100.sh [METHOD] [REGULARIZER] [further flags of main_cssl.py]      default: moco pnr
#   DATA=DIR   torchvision's files, or train/<class>/ and test/<class>/ (datasets; --download fetches it)
#   OUT=DIR    the run folder (runs/cifar100-TASKS-METHOD-REGULARIZER); the same command again resumes it
#   TASKS=N    5 or 10 (5)         GPUS=N  processes on this machine (1); the results are those of one
#   PYTHON=... an interpreter to use instead of .venv
set -euo pipefail
# relative folders are those of the caller
case ${DATA:=datasets} in datasets|/*) ;; *) DATA=$PWD/$DATA ;; esac
case ${OUT:=} in ""|/*) ;; *) OUT=$PWD/$OUT ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")"
METHOD=moco REGULARIZER=pnr
if [[ $# -gt 0 && $1 != -* ]]; then METHOD=$1; shift; fi
if [[ $# -gt 0 && $1 != -* ]]; then REGULARIZER=$1; shift; fi
TASKS=${TASKS:-5} GPUS=${GPUS:-1}
OUT=${OUT:-runs/cifar100-$TASKS-$METHOD-$REGULARIZER}
if ! [[ $GPUS =~ ^[1-9][0-9]*$ ]]; then echo "run_cifar100.sh: error: GPUS=$GPUS is not a number of processes" >&2; exit 2; fi

# The paper's table; lr is per 256 images (Adam's 1e-3 at FALCON's batch of 64), lambda_neg that of CIFAR-100.
BATCH=256 VIEWS="--min_scale 0.08 --blur_p 0 0 --solarize_p 0 0.2"
case $METHOD in
  moco)   FLAGS="--lr 0.6 --weight_decay 1e-4 --moco_queue_size 65536 --moco_tau 0.2 --moco_ema 0.99 0.999" ;;
  simclr) FLAGS="--lr 0.6 --weight_decay 1e-4 --simclr_tau 0.2" ;;
  barlow) FLAGS="--lr 0.4 --weight_decay 1e-4 --barlow_lambda 5e-3 --barlow_scale_loss 0.1 --barlow_lambda_neg 1" ;;
  byol)   FLAGS="--lr 1.0 --weight_decay 1e-5 --byol_predictor_hidden 4096 --byol_ema 0.99 1 --byol_lambda_neg 0.5" ;;
  vicreg) FLAGS="--lr 0.3 --weight_decay 1e-4 --vicreg_lambda_distill 25 --vicreg_lambda_neg 23"
          VIEWS="--min_scale 0.2 --blur_p 0 0 --solarize_p 0.1 0.1" ;;
  falcon) FLAGS="--optimizer adam --lr 4e-3 --weight_decay 1e-4 --falcon_codes 16384 --falcon_beta 1 --falcon_lambda_neg 0.1" BATCH=64 ;;
  *)      echo "run_cifar100.sh: error: unknown method $METHOD: choose moco, simclr, barlow, byol, vicreg or falcon" >&2; exit 2 ;;
esac

source utils/python.sh requirements.txt
LAUNCH=("$PYTHON")
if [ "$GPUS" -gt 1 ]; then
  LAUNCH=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$GPUS")
  # so that SIGUSR1, too, reaches the workers, where this version of torch can be asked to pass it on
  if "${LAUNCH[@]}" --help | grep -c -- signals >/dev/null; then LAUNCH+=(--signals_to_handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1); fi
fi
# shellcheck disable=SC2086
exec "${LAUNCH[@]}" main_cssl.py --dataset cifar100 --data_dir "$DATA" --scenario class --num_tasks "$TASKS" \
  --backbone resnet18 --epochs 500 --batch_size $BATCH $VIEWS --method "$METHOD" --regularizer "$REGULARIZER" $FLAGS \
  --out_dir "$OUT" "$@"
