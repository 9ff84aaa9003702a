"""Where published spellings of a key lead, and which published keys nothing reads.

The published files mix sections and flat keys: their loader copies the keys of eight sections to the top level (spec inference §9.5).
Here every key has one home. A key that is written flat, or in another of the eight sections, goes home by its name; the exceptions are listed.
"""

from __future__ import annotations

FLATTENED = ("infra", "algorithm", "training", "data", "evaluation", "inference", "logging", "checkpoints")

# written key -> its home. A bare name applies at top level and in any flattened section that has no such key itself.
ALIASES = {
    "inference_sink_size": "inference.sink_size",
    "inference_local_attn_size": "inference.local_attn_size",
    "save_latent_only": "save_latents_only",
    "return_latents": "save_latents_only",
    "save_latents_only": "save_latents_only",
    "use_ema": "inference.use_ema",
    "context_noise": "algorithm.context_noise",
    "timestep_shift": "model_kwargs.timestep_shift",
    "num_frame_per_block": "model_kwargs.num_frame_per_block",
    "model_name": "model_kwargs.model_name",
    "model.name": "model_kwargs.model_name",
    "model.num_frame_per_block": "model_kwargs.num_frame_per_block",
    "val_data_path": "data.eval_data_path",
    "generate_interval": "evaluation.interval",
    "vis_interval": "evaluation.interval",
    "inference_num_frames": "evaluation.num_frames",
    "vis_video_lengths": "evaluation.num_frames",
    "vis_ema": "evaluation.use_ema",
    "t_scale": "model_kwargs.t_scale",
    "error_recycling": "training.error_recycling",
}

# published keys that nothing reads -> why (spec training D22). Reported once, then ignored.
INERT = {
    "inference.narrative_rope_phase_shift": "nothing ever read it; the shot offset is inference.multi_shot_rope_offset",
    "adapter.dtype": "LoRA weights follow the precision of the model",
}

# documented schema keys that have no effect here -> why. Reported once where they are given.
WITHOUT_EFFECT = {
    "infra.text_encoder_fsdp_wrap_strategy": "the text encoder is frozen and whole on every rank; infra.text_encoder_cpu_offload frees its memory",
    "infra.real_score_fsdp_wrap_strategy": "all networks of distillation are wrapped by infra.generator_fsdp_wrap_strategy",
    "infra.fake_score_fsdp_wrap_strategy": "all networks of distillation are wrapped by infra.generator_fsdp_wrap_strategy",
}

# schema keys that nothing reads in some setting: key -> (setting as text, why)
INERT_IN_ROLLOUTS = {
    "algorithm.denoising_step_list": "rollouts use the solver's own grid of inference.sampling_steps",
    "algorithm.warp_denoising_step": "rollouts use the solver's own grid of inference.sampling_steps",
}
