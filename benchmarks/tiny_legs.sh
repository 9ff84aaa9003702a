#!/bin/sh
# The small model's weights, leg by leg, as docs/recipes/tiny.md describes them: benchmarks/tiny_legs.sh OUT [leg ...]
# Legs: vae1 vae2 judge ar1 ar2 ar3 ar4 ar5 few4 few4b few2; none named: these, in order. few4s is the streaming leg, qat1 and qat2 train in NVFP4
# (docs/precision.md); they do not ship. Every leg is one command of less than ten minutes and starts from the files of the legs before it in OUT. GPUS (default 4) processes train a leg of several; seconds of
# training, seeds and settings are those of the shipped weights.
# SCALE divides the seconds and the stories, for a rehearsal: SCALE=100.
set -eu
out=$1; shift
[ $# -gt 0 ] || set -- vae1 vae2 judge ar1 ar2 ar3 ar4 ar5 few4 few4b few2
gpus=${GPUS:-4}; scale=${SCALE:-1}; export PYTHONUNBUFFERED=1

leg() { # name config processes seconds key=value ...
  name=$1 config=$2 processes=$3 seconds=$(($4 / scale)); shift 4
  launch="python3 -m"; [ "$processes" -gt 1 ] && launch="torchrun --standalone --nproc_per_node=$processes -m"
  $launch longlive train "configs/tiny/$config" --logdir "$out/$name" --disable-wandb --no_save training.max_seconds="$seconds" "$@"
}
ema() { echo "checkpoints.generator_ckpt=$out/$1/dit-00001-of-00002.safetensors"; }
raw() { echo "checkpoints.generator_ckpt=$out/$1/raw-00001-of-00003.safetensors"; }
small() { rm -f "$out/lora-$2steps.safetensors"; python3 -m longlive export "$out/$1/lora.pt" "$out/lora-$2steps.safetensors" --rank 16; }  # as it ships
half=$(((gpus + 1) / 2)); early="checkpoints.vae_ckpt=$out/vae1/vae.safetensors" late="checkpoints.vae_ckpt=$out/vae2/vae.safetensors"
adamw="training.optimizer=adamw training.weight_decay=0.0 world.wordings=1 training.batch_size=8 world.clips=$((2200 / scale))"
stories="world.clips=$((2048 / scale))"
told="world.memory=0 world.away=0.25"
fp4="infra.model_quant=true infra.model_quant_scale_rule=mse infra.model_quant_activation_scale_rule=mse training.compile=false training.batch_size=4 training.ema_start_step=20 world.chunks=8"
for step in "$@"; do
  case $step in
    vae1) leg vae1 train_vae.yaml 1 430 vae.mask_weight=4 vae.mse_weight=2 ;;
    vae2) leg vae2 train_vae.yaml "$half" 340 checkpoints.vae_ckpt="$out/vae1/vae.safetensors" logging.seed=2 world.seed=2 training.lr=7.0e-4 ;;
    judge) leg judge train_judge.yaml 1 75 ;;
    ar1) leg ar1 train_ar.yaml "$gpus" 400 $early $adamw $told training.lr_schedule=constant training.character_weight=4 ;;
    ar2) leg ar2 train_ar.yaml "$gpus" 455 $early $adamw $told "$(ema ar1)" world.seed=2 logging.seed=2 training.character_weight=6 ;;
    ar3) leg ar3 train_ar.yaml "$half" 440 $early $adamw "$(ema ar2)" world.seed=3 logging.seed=3 training.character_weight=6 training.lr=6.0e-4 \
      training.lr_schedule=constant ;;
    ar4) leg ar4 train_ar.yaml "$half" 430 $late "$(ema ar3)" world.seed=4 logging.seed=4 training.batch_size=8 training.lr_schedule=constant \
      world.clips=$((2600 / scale)) world.memory=0.3 ;;
    ar5) leg ar5 train_ar.yaml "$gpus" 345 $late "$(raw ar4)" world.seed=5 logging.seed=5 training.batch_size=5 world.clips=$((1500 / scale)) \
      world.chunks=12 world.min_shots=3 world.max_shots=6 world.memory=0.4 world.away=0.5 ;;
    few4) leg few4 train_dmd.yaml 1 370 "$(ema ar5)" $stories ;;
    few4b) leg few4b train_dmd.yaml 1 180 "$(ema ar5)" $stories checkpoints.lora_ckpt="$out/few4/lora.pt" algorithm.regression_steps=0 training.lr=1.5e-4 world.seed=102 logging.seed=2
      small few4b 4 ;;
    few4s) leg few4s train_dmd.yaml 1 180 "$(ema ar5)" world.clips=$((1024 / scale)) checkpoints.lora_ckpt="$out/few4/lora.pt" algorithm.regression_steps=0 training.lr=1.5e-4 \
      world.seed=103 logging.seed=3 training.streaming_frames=240 world.min_shots=4 world.max_shots=8 training.compile=false ;;
    few2) leg few2 train_dmd.yaml 1 370 "$(ema ar5)" $stories inference.sampling_steps=2 algorithm.regression_steps=250
      small few2 2 ;;
    qat1) leg qat1 train_ar.yaml 1 140 "$(ema ar5)" $fp4 training.lr=3.0e-4 training.warmup_steps=50 training.ema_weight=0.99 world.seed=9 logging.seed=9 world.clips=$((512 / scale)) ;;
    qat2) leg qat2 train_ar.yaml 1 170 "$(ema qat1)" $fp4 training.lr=4.0e-4 training.warmup_steps=30 training.ema_weight=0.995 world.seed=10 logging.seed=10 world.clips=$((640 / scale)) ;;
    *) echo "unknown leg $step (vae1 vae2 judge ar1 ar2 ar3 ar4 ar5 few4 few4b few4s few2 qat1 qat2)" >&2; exit 2 ;;
  esac
done
