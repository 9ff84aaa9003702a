"""`infra`, `algorithm`, `training`, `evaluation` and `logging`: how a model is trained. Defaults of keys that only distillation reads are its own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .quant import Quantisation
from .section import Section, option

Wrap = Literal["size", "transformer"]


class Infra(Quantisation):
    sequence_parallel_size: int = option(1, "ranks that share one training sample", ge=1)
    sharding_strategy: Literal["full", "hybrid_full", "hybrid_zero2", "no_shard"] = option("hybrid_full", "how parameters are sharded")
    mixed_precision: bool = option(True, "bf16 compute, fp32 masters and reductions")
    gradient_checkpointing: bool = option(True, "recompute activations of each transformer block")
    keep_attention: Literal["auto"] | Annotated[int, Field(ge=0)] = option(
        "auto", "with gradient_checkpointing: blocks that keep what attention read instead of attending again; auto = as many as fit"
    )
    keep_blocks: int = option(0, "with gradient_checkpointing: the last so many blocks keep all their activations", ge=0)
    rollout_copy: bool = option(False, "distillation: a merged copy of the student takes the steps without gradients; faster, for the memory of one network")
    vae_halo_latents: int = option(28, "sequence-parallel VAE encode: latents of left context (27 is exact)", ge=0)
    generator_fsdp_wrap_strategy: Wrap = option("size", "FSDP units of the generator")
    text_encoder_fsdp_wrap_strategy: Wrap = option("size", "FSDP units of the text encoder")
    real_score_fsdp_wrap_strategy: Wrap = option("size", "FSDP units of the teacher")
    fake_score_fsdp_wrap_strategy: Wrap = option("size", "FSDP units of the critic")
    text_encoder_cpu_offload: bool = option(False, "keep the text encoder on the CPU")


class Algorithm(Section):
    trainer: Literal["diffusion", "score_distillation", "vae", "judge"] = option("diffusion", "teacher forcing, DMD, the small VAE, or the judge")
    causal: bool = option(True, "the generator is chunk-causal")
    teacher_forcing: bool = option(False, "noisy chunks attend to clean earlier chunks")
    i2v: bool = option(False, "the first latent frame is given")
    independent_first_frame: bool | None = option(None, "documented companion of i2v; null = as i2v")
    num_train_timestep: int = option(1000, "entries of the noise schedule", ge=1)
    denoising_loss_type: Literal["flow"] = option("flow", "loss on the velocity")
    noise_augmentation_max_timestep: int = option(0, "noise on the clean history, up to this schedule entry", ge=0, le=1000)
    distribution_loss: Literal["dmd"] = option("dmd", "distillation loss")
    real_guidance_scale: float = option(3.0, "guidance of the teacher (g in cond + g (cond - uncond))")
    fake_guidance_scale: float = option(0.0, "guidance of the critic")
    regression_steps: int = option(
        0, "steps at the start of the run in which the student learns the guided teacher's answer at its exit step, and the critic to follow", ge=0
    )
    backward_simulation: bool = option(True, "distil on the student's own rollouts")
    all_causal: bool = option(True, "teacher and critic are chunk-causal too")
    generator_is_causal: bool = option(True, "the student is chunk-causal")
    real_score_mask: Literal["causal", "teacher_forced", "bidirectional"] | None = option(
        None, "how the teacher sees a film; null: teacher_forced with teacher_forcing, else causal with all_causal, else bidirectional"
    )
    fake_score_mask: Literal["causal", "teacher_forced", "bidirectional"] | None = option(None, "how the critic sees a film; null: likewise")
    ts_schedule: bool = option(False, "draw the score timestep above the rollout's exit step")
    ts_schedule_max: bool = option(False, "and below the step before")
    min_score_timestep: int = option(0, "least score timestep", ge=0, le=1000)
    same_step_across_blocks: bool = option(True, "one exit step for all chunks of a rollout")
    last_step_only: bool = option(False, "always exit at the last step")
    context_noise: float = option(0.0, "timestep of the clean pass in rollouts", ge=0, le=1000)
    warp_denoising_step: bool = option(False, "shift denoising_step_list")
    denoising_step_list: tuple[float, ...] | None = option(None, "steps of off-policy distillation (backward_simulation: false)")


class ErrorRecycling(Section):
    """Training on the model's own errors (spec training §4)."""

    enabled: bool = option(False, "turn error recycling on")
    num_buckets: int = option(50, "slices of the timestep range", ge=1)
    enable_position_bucketing: bool = option(False, "keep errors by chunk position too")
    max_size_per_bucket: int = option(500, "entries of one bucket", ge=1)
    replacement_strategy: Literal["random", "fifo", "l2"] = option("random", "what a full bucket overwrites")
    modulate_factor: float = option(0.3, "samples are scaled by 1 +- this", ge=0, lt=1)
    start_step: int = option(0, "first step that injects", ge=0)
    buffer_warmup_iter: int = option(50, "steps that gather errors from all ranks", ge=0)
    clean_prob: float = option(0.2, "share of steps without injection", ge=0, le=1)
    clean_buffer_update_prob: float = option(0.1, "share of those that still store", ge=0, le=1)
    noise_prob: float = option(0.01, "injection into the noise", ge=0, le=1)
    latent_prob: float = option(0.9, "injection into the noisy latents", ge=0, le=1)
    context_prob: float = option(0.9, "injection into the clean history", ge=0, le=1)
    skip_block_0: bool = option(False, "keep the first chunk of the history clean")


class Training(Section):
    lr: float = option(1.0e-5, "learning rate", gt=0)
    lr_critic: float = option(2.0e-6, "learning rate of the critic", gt=0)
    lr_schedule: Literal["constant", "cosine"] = option("constant", "course of the learning rate after warm-up")
    warmup_steps: int = option(0, "steps of linear warm-up", ge=0)
    optimizer: Literal["adamw", "muon"] = option("adamw", "muon: orthogonal updates for the matrices of blocks, AdamW for the rest")
    weight_decay: float = option(0.0, "AdamW weight decay", ge=0)
    beta1: float = option(0.0, "AdamW beta1", ge=0, lt=1)
    beta2: float = option(0.999, "AdamW beta2", ge=0, lt=1)
    beta1_critic: float = option(0.0, "AdamW beta1 of the critic", ge=0, lt=1)
    beta2_critic: float = option(0.999, "AdamW beta2 of the critic", ge=0, lt=1)
    max_grad_norm: float = option(10.0, "gradient clip", gt=0)
    max_grad_norm_generator: float = option(10.0, "gradient clip of the student", gt=0)
    max_grad_norm_critic: float = option(10.0, "gradient clip of the critic", gt=0)
    batch_size: int = option(1, "samples of a rank and micro-step", ge=1)
    gradient_accumulation_steps: int = option(1, "micro-steps of one optimizer step", ge=1)
    ema_weight: float = option(0.99, "EMA decay; 0 = no EMA", ge=0, lt=1)
    ema_start_step: int = option(100, "first step of the EMA", ge=0)
    log_iters: int = option(100, "steps between checkpoints; 0 = never", ge=0)
    max_checkpoints: int = option(0, "checkpoints kept; 0 = all", ge=0)
    max_iters: int = option(600, "optimizer steps; 0 = until max_seconds", ge=0)
    max_seconds: float = option(0.0, "stop after so many seconds; 0 = no limit", ge=0)
    gc_interval: int = option(100, "steps between garbage collections", ge=1)
    dfake_gen_update_ratio: int = option(5, "critic steps per student step", ge=1)
    min_num_training_frames: int = option(21, "shortest rollout in latent frames", ge=1)
    num_training_frames: int = option(21, "longest rollout in latent frames", ge=1)
    slice_last_frames: int = option(21, "latent frames at the end that get gradients", ge=1)
    critic_reuses_rollout: bool = option(False, "distillation: where the student learns, its critic learns on the same rollout")
    finish_chunks: bool = option(False, "distillation: later chunks read what has gone through all steps, as in generation, not what left at the exit step")
    streaming_frames: int = option(0, "distillation: rollouts go on from step to step until a film is so many latent frames long; 0 = each begins a film", ge=0)
    error_recycling: ErrorRecycling = option(ErrorRecycling(), "train on the model's own errors")
    noisy_copies: int = option(1, "noisy copies that share one clean copy", ge=1)
    text_dropout: float = option(0.0, "share of samples with the empty prompt", ge=0, le=1)
    i2v_prob: float = option(1.0, "with algorithm.i2v: share of samples whose first frame is given", ge=0, le=1)
    context_noise: float = option(0.0, "largest sigma of noise on clean context", ge=0, lt=1)
    context_noise_prob: float = option(0.0, "share of context chunks that get it", ge=0, le=1)
    position_gap: int = option(0, "largest gap in latent frames put between anchor or pin and the rest", ge=0)
    position_gap_prob: float = option(0.0, "share of samples that get a gap", ge=0, le=1)
    visibility: Literal["all", "window"] = option("all", "earlier chunks that are seen: all, or those of the generation window")
    shot_offset: bool = option(False, "use inference.multi_shot_rope_offset in training")
    compile: bool = option(False, "torch.compile the transformer blocks")
    min_loss_weight: float = option(0.0, "least weight of a noise level; the published weights fall to 0 at pure noise", ge=0)
    character_weight: float = option(1.0, "loss weight of latents that show characters", gt=0)


class Evaluation(Section):
    interval: int = option(0, "steps between evaluations; 0 or -1 = never", ge=-1)
    num_frames: int | tuple[int, ...] = option(0, "latent frames of the evaluation films, one number or a list; 0 = as trained")
    use_ema: bool = option(False, "evaluate the EMA weights too")
    val_batch_size: int = option(1, "prompts at a time", ge=1)
    save_latents_only: bool = option(False, "write latents instead of videos")


class Logging(Section):
    seed: int = option(1, "seed of everything; training: 0 draws one", ge=0)
    wandb_key: str | None = option(None, "Weights & Biases key")
    wandb_entity: str | None = option(None, "Weights & Biases entity")
    wandb_project: str | None = option(None, "Weights & Biases project")
    wandb_host: str = option("https://api.wandb.ai", "Weights & Biases server")
