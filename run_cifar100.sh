#!/usr/bin/env bash
# CIFAR-100, class-incremental, with the paper's settings (ResNet-18, 500 epochs a task) and the paper's online probe.
#   bash run_cifar100.sh [METHOD] [REGULARIZER] [further flags of main_cssl.py]      default: moco pnr
#   DATA=DIR   torchvision's files, or train/<class>/ and test/<class>/ (datasets; --download fetches it)
#   OUT=DIR    the run folder (such as runs/cifar100-class5-moco-pnr-seed5); the same command again resumes it
#   SCENARIO=class|data (class; data: equal parts of the images, a split that the paper has for ImageNet-100 only)
#   TASKS=N    5 or 10 (5)         GPUS=N  processes on this machine (1); the results are those of one
#   PYTHON=... an interpreter (python, if it has PyTorch, or else that of .venv)
#   REFERENCE=1 with METHOD finetune: each task alone, which plasticity is measured against (--reference)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"
TASKS=${TASKS:-5}

# The paper's table; lr is per 256 images (Adam's 2.5e-4 at FALCON's batch of 64), lambda_neg that of CIFAR-100.
BATCH=256 VIEWS="--min_scale 0.08 --blur_p 0 0 --solarize_p 0 0.2"
case $METHOD in
  moco)   TABLE="--lr 0.6 --weight_decay 1e-4 --moco_queue_size 65536 --moco_tau 0.2 --moco_ema 0.99 0.999" ;;
  simclr) TABLE="--lr 0.6 --weight_decay 1e-4 --simclr_tau 0.2" ;;
  barlow) TABLE="--lr 0.4 --weight_decay 1e-4 --barlow_lambda 5e-3 --barlow_scale_loss 0.1 --barlow_lambda_neg 1" ;;
  byol)   TABLE="--lr 1.0 --weight_decay 1e-5 --byol_predictor_hidden 4096 --byol_ema 0.99 1 --byol_lambda_neg 0.5" ;;
  vicreg) TABLE="--lr 0.3 --weight_decay 1e-4 --vicreg_lambda_distill 25 --vicreg_lambda_neg 23"
          VIEWS="--min_scale 0.2 --blur_p 0 0 --solarize_p 0.1 0.1" ;;
  falcon) TABLE="--optimizer adam --lr 1e-3 --weight_decay 1e-4 --falcon_codes 16384 --falcon_beta 1 --falcon_lambda_neg 0.1" BATCH=64 ;;
  *)      TABLE="" ;; # a method of your own: its own defaults
esac
# shellcheck disable=SC2086
launch --dataset cifar100 --scenario "${SCENARIO:-class}" --num_tasks "$TASKS" --epochs 500 --batch_size $BATCH --online_probe released \
  $VIEWS $TABLE
