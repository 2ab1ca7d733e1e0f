#!/usr/bin/env bash
# DomainNet, domain-incremental, with the paper's settings (ResNet-18, 200 epochs a task; real, quickdraw, painting, sketch,
# infograph, clipart), and after every task the paper's offline linear evaluation.
#   bash run_domainnet.sh [METHOD] [REGULARIZER] [further flags of main_cssl.py]      default: moco pnr
#   DATA=DIR   <domain>/<class>/<image>, <domain>_train.txt and <domain>_test.txt of all six (datasets)
#   OUT=DIR    the run folder (such as runs/domainnet-domain6-moco-pnr-seed5); the same command again resumes it
#   GPUS=N     processes on this machine (1); the results are those of one
#   PYTHON=... an interpreter (python, if it has PyTorch, or else that of .venv)
#   REFERENCE=1 with METHOD finetune: each task alone, which plasticity is measured against (--reference)
# Decoding keeps a GPU waiting? --cache DIR (about 0.25 MB an image, made once) or more --workers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"

# The paper's table; lr is per 256 images (Adam's 2.5e-4 at FALCON's batch of 64); probe_lr that of the offline linear evaluation;
# lambda_neg that of DomainNet.
BATCH=256 VIEWS="--min_scale 0.08 --blur_p 1 0.1 --solarize_p 0 0.2"
case $METHOD in
  moco)   TABLE="--lr 0.6 --weight_decay 1e-4 --probe_lr 3 --moco_queue_size 65536 --moco_tau 0.2 --moco_ema 0.99 0.999" ;;
  simclr) TABLE="--lr 0.4 --weight_decay 1e-4 --probe_lr 1 --online_lr 0.3 --simclr_tau 0.2" ;;
  barlow) TABLE="--lr 0.4 --weight_decay 1e-4 --probe_lr 0.1 --online_lr 0.3 --barlow_lambda 5e-3 --barlow_scale_loss 0.1 --barlow_lambda_neg 1" ;;
  byol)   TABLE="--lr 0.6 --weight_decay 1e-5 --probe_lr 3 --byol_predictor_hidden 8192 --byol_ema 0.99 1 --byol_lambda_neg 1" ;;
  vicreg) TABLE="--lr 0.4 --weight_decay 1e-4 --probe_lr 0.3 --vicreg_lambda_distill 25 --vicreg_lambda_neg 8"
          VIEWS="--min_scale 0.2 --blur_p 0.5 0.5 --solarize_p 0.1 0.1" ;;
  falcon) TABLE="--optimizer adam --lr 1e-3 --weight_decay 1e-4 --probe_lr 0.1 --falcon_codes 16384 --falcon_beta 1"
          TABLE+=" --falcon_lambda_neg 0.1" BATCH=64 ;;
  *)      TABLE="" ;; # a method of your own: its own defaults
esac
# shellcheck disable=SC2086
launch --dataset domainnet --scenario domain --epochs 200 --image_size 224 --probe_views augmented --batch_size $BATCH $VIEWS $TABLE
