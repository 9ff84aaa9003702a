#!/bin/sh
# One leg of the small model's training, as docs/recipes/tiny.md describes it: benchmarks/tiny_legs.sh vae|ar1|ar2 OUT [key=value ...]
# ar1 takes the VAE from OUT/vae when it is there, ar2 the weights from OUT/ar1; otherwise those that ship with the package, and none.
set -eu
leg=$1; out=$2; shift 2
PYTHONUNBUFFERED=1; export PYTHONUNBUFFERED
vae=; [ -f "$out/vae/vae.safetensors" ] && vae="checkpoints.vae_ckpt=$out/vae/vae.safetensors"
start=$(ls "$out"/ar1/raw-00001-of-*.safetensors 2>/dev/null | head -n 1 || true)
train() { config=$1; shift; python3 -m longlive train "configs/tiny/$config" --logdir "$out/$leg" --disable-wandb --no_save "$@"; }
case $leg in
  vae) train train_vae.yaml "$@" ;;
  ar1) train train_ar.yaml $vae training.lr_schedule=constant "$@" ;;
  ar2) train train_ar.yaml $vae ${start:+checkpoints.generator_ckpt=$start} world.seed=2 logging.seed=2 training.lr=8.0e-4 "$@" ;;
  *) echo "unknown leg $leg (vae, ar1, ar2)" >&2; exit 2 ;;
esac
