"""Rules that tie keys together, checked before any weight is read. Each message prints the equation and the remedy."""

from __future__ import annotations

from ..core.errors import ConfigError, InputError
from ..core.geometry import Geometry
from ..core.log import environment
from .root import Config

# keys of `training` that distillation does not read -> their value of no effect
TEACHER_FORCED_ONLY = {
    "noisy_copies": 1, "text_dropout": 0, "i2v_prob": 1, "context_noise": 0, "position_gap": 0, "min_loss_weight": 0, "character_weight": 1,
}  # fmt: skip


def check(config: Config, label: str) -> None:
    """Raises ConfigError (prefixed by `label`) for the first rule that `config` breaks."""
    for rule in (_chunks, _window, _shape, _precision, _image, _ranks, _training, _distillation):
        problem = rule(config)
        if problem:
            raise ConfigError(f"{label}: {problem}")


def _chunks(c: Config) -> str | None:
    n = c.chunk_frames
    shape = c.data.image_or_video_shape[1]
    counts = c.evaluation.num_frames if isinstance(c.evaluation.num_frames, tuple) else (c.evaluation.num_frames,)
    named = [("num_output_frames", c.num_output_frames), *(("evaluation.num_frames", f) for f in counts)]
    if c.algorithm.trainer in ("diffusion", "score_distillation"):
        named.append(("data.image_or_video_shape[1]", shape))
    for name, frames in named:
        if frames < 0 or frames % n:
            return f"{name}({frames}) % num_frame_per_block({n}) = {frames % n}, not 0: a film is whole chunks; use {max(1, round(frames / n)) * n}"
    return None


def _window(c: Config) -> str | None:
    n = c.chunk_frames
    for section, values in (("model_kwargs", c.model_kwargs), ("inference", c.inference)):
        sink, window = values.sink_size, values.local_attn_size
        if sink not in (0, n):
            return f"{section}.sink_size({sink}) is neither 0 nor num_frame_per_block({n}): sinks are kept as whole chunks; use 0 or {n}"
        if window == -1:
            continue
        if window < n or window % n:
            equation = f"{section}.local_attn_size({window}) % num_frame_per_block({n}) = {window % n}, not 0"
            return f"{equation}: the window is whole chunks; use {max(1, round(window / n)) * n}"
        least = n * (1 + (sink > 0) + (sink > 0 and c.inference.multi_shot_sink))
        if window < least:
            equation = f"{section}.local_attn_size({window}) < {least} = {least // n} chunks of {n}"
            return f"{equation}: the sinks leave no room for the current chunk; use {least}"
    return None


def _shape(c: Config) -> str | None:
    batch, frames, channels, height, width = c.data.image_or_video_shape
    if channels != 48 or frames < 1 or batch < 1:
        return f"data.image_or_video_shape = {list(c.data.image_or_video_shape)}: [B, F, C, H, W] with C = 48 and B, F >= 1"
    try:
        Geometry.of_latent(height, width)
    except InputError as error:
        return f"data.image_or_video_shape H, W = {height}, {width} latents = {height * 16} x {width * 16} pixels: {error}"
    return None


def _precision(c: Config) -> str | None:
    if c.fp8_quant and c.infra.model_quant:
        return "fp8_quant(true) and model_quant(true) exclude each other: weights have one precision; set one of them to false"
    if c.checkpoints.lora_ckpt and c.adapter is None:
        given = f"checkpoints.lora_ckpt = {c.checkpoints.lora_ckpt!r} without an adapter section"
        return f"{given}: nothing would apply it; add `adapter: {{}}` or remove lora_ckpt"
    if c.adapter and isinstance(c.adapter.weight, tuple):
        files = c.checkpoints.lora_ckpt if isinstance(c.checkpoints.lora_ckpt, tuple) else (c.checkpoints.lora_ckpt,)
        if len(c.adapter.weight) != len(files):
            counts = f"adapter.weight has {len(c.adapter.weight)} numbers for {len(files)} LoRA files (checkpoints.lora_ckpt)"
            return f"{counts}; give one each, or one number for all"
    if c.merge_lora and c.adapter is None:
        return "merge_lora(true) without an adapter section: there is nothing to merge; remove merge_lora or add the adapter"
    return None


def _image(c: Config) -> str | None:
    if c.algorithm.independent_first_frame != c.algorithm.i2v:
        return (
            f"i2v({c.algorithm.i2v}) != independent_first_frame({c.algorithm.independent_first_frame}): "
            "the first frame stands apart exactly when it is given; set both or neither"
        )
    return None


def _ranks(c: Config) -> str | None:
    if c.sp_size not in (1, 2, 4, 8):
        return f"sp_size({c.sp_size}) is none of 1, 2, 4, 8"
    for name, count in (("model_num_heads", c.model_num_heads), ("num_frame_per_block", c.chunk_frames)):
        if c.sp_size > 1 and count % c.sp_size:
            return f"{name}({count}) % sp_size({c.sp_size}) = {count % c.sp_size}, not 0: every rank takes equal parts; use another sp_size"
    world = environment("WORLD_SIZE")
    asked = c.sp_size * c.dp_size
    if world is not None and asked > 1 and not c.auto_sp_remainder and asked != int(world):
        return f"sp_size({c.sp_size}) x dp_size({c.dp_size}) = {asked} != WORLD_SIZE({world}); launch {asked} processes or change the sizes"
    if c.sp_size > 1 and c.inference.cuda_graphs is True:
        return f"inference.cuda_graphs(true) with sp_size({c.sp_size}): forwards that ranks share are not recorded; set it to false or auto"
    if asked > 1 and c.inference.device.startswith("cuda:"):
        return f"inference.device({c.inference.device}) is one card for sp_size({c.sp_size}) x dp_size({c.dp_size}) processes; use cuda: each takes its own"
    p = c.infra.sequence_parallel_size
    if world is not None and p > 1 and int(world) % p:
        return f"WORLD_SIZE({world}) % infra.sequence_parallel_size({p}) = {int(world) % p}, not 0; launch a multiple of {p} processes"
    return None


def _training(c: Config) -> str | None:
    p, n, frames = c.infra.sequence_parallel_size, c.chunk_frames, c.data.image_or_video_shape[1]
    if p > 1 and frames % (p * n):
        equation = f"image_or_video_shape[1]({frames}) % (sequence_parallel_size({p}) x num_frame_per_block({n})) = {frames % (p * n)}, not 0"
        return f"{equation}: every rank owns whole chunks"
    if p > 1 and c.model_num_heads % p:
        return f"model_num_heads({c.model_num_heads}) % sequence_parallel_size({p}) = {c.model_num_heads % p}, not 0: every rank takes equal heads"
    t = c.training
    if not t.max_iters and not t.max_seconds:
        return "training.max_iters(0) and training.max_seconds(0.0): the run would never end; set one of them"
    if c.algorithm.noise_augmentation_max_timestep and t.context_noise:
        both = f"algorithm.noise_augmentation_max_timestep({c.algorithm.noise_augmentation_max_timestep}) and training.context_noise({t.context_noise})"
        return f"{both} both put noise on the clean history; set one of them to 0"
    if t.position_gap and t.visibility == "window" and c.inference.use_relative_rope:
        return f"training.position_gap({t.position_gap}) has no meaning for positions inside the window (inference.use_relative_rope); set one of them to 0"
    if c.adapter is not None and t.optimizer == "muon" and c.algorithm.trainer == "diffusion":
        return "training.optimizer(muon) with an adapter section: the narrow matrices of a LoRA learn with adamw; set it to adamw"
    if c.world.min_shots > c.world.max_shots:
        return f"world.min_shots({c.world.min_shots}) > world.max_shots({c.world.max_shots}); swap them"
    if c.data.min_latent_frames % n:
        return f"data.min_latent_frames({c.data.min_latent_frames}) % num_frame_per_block({n}) = {c.data.min_latent_frames % n}, not 0"
    return None


def _distillation(c: Config) -> str | None:
    if c.algorithm.trainer != "score_distillation":
        return None
    t, n, p, frames = c.training, c.chunk_frames, c.infra.sequence_parallel_size, c.data.image_or_video_shape[1]
    for key in ("min_num_training_frames", "num_training_frames", "slice_last_frames"):
        count = getattr(t, key)
        if count % n:
            return f"training.{key}({count}) % num_frame_per_block({n}) = {count % n}, not 0: a rollout is whole chunks; use {max(1, round(count / n)) * n}"
    if t.min_num_training_frames > t.num_training_frames:
        return f"min_num_training_frames({t.min_num_training_frames}) > num_training_frames({t.num_training_frames}); swap them"
    if t.num_training_frames > frames and not t.streaming_frames:
        return f"training.num_training_frames({t.num_training_frames}) > image_or_video_shape[1]({frames}): the films are not that long; raise the latter"
    if t.streaming_frames:
        long, short = t.streaming_frames, t.num_training_frames
        if long % n or long < short:
            return f"training.streaming_frames({long}) is not a multiple of {n} that num_training_frames({short}) fits in; use {-(-max(long, short) // n) * n}"
        if t.slice_last_frames < short:
            return f"training.slice_last_frames({t.slice_last_frames}) < num_training_frames({short}) with streaming_frames: every segment counts; use {short}"
        if c.inference.shot_clean_recache or not c.algorithm.backward_simulation:
            return f"training.streaming_frames({long}) needs shot_clean_recache: false and backward_simulation: true"
        if t.critic_reuses_rollout and t.gradient_accumulation_steps > 1:
            several = f"training.gradient_accumulation_steps({t.gradient_accumulation_steps})"
            return f"{several} with streaming_frames: films have gone on before the critic sees a rollout; set critic_reuses_rollout: false"
    a = c.algorithm
    if a.regression_steps:
        if (a.real_score_mask or ("teacher_forced" if a.teacher_forcing else None)) != "teacher_forced":
            return f"algorithm.regression_steps({a.regression_steps}): the teacher answers for a chunk behind clean ones; set real_score_mask: teacher_forced"
        if t.streaming_frames or not a.backward_simulation:
            return f"algorithm.regression_steps({a.regression_steps}) needs streaming_frames: 0 and backward_simulation: true; use regression_steps: 0"
        if t.visibility != "window" or (not t.shot_offset and c.inference.multi_shot_rope_offset) or a.context_noise:
            served = "visibility: window, shot_offset: true, context_noise: 0"
            return f"algorithm.regression_steps({a.regression_steps}): teacher and student must read the same history, as generation does; set {served}"
    if n % p:
        return f"num_frame_per_block({n}) % sequence_parallel_size({p}) = {n % p}, not 0: ranks share every chunk of a rollout; use 1, 2, 4 or 8"
    if not c.algorithm.backward_simulation and c.data.data_path is None:
        return "algorithm.backward_simulation(false) noises films of the data, and data.data_path is null; give a folder of videos, or set it to true"
    listed = c.algorithm.denoising_step_list
    if not c.algorithm.backward_simulation and listed is not None and not all(0 <= step <= 1000 for step in listed):
        return f"algorithm.denoising_step_list({', '.join(map(str, listed))}) holds a step outside of 0 to 1000; these are timesteps"
    if not c.algorithm.backward_simulation and listed is not None and not any(listed):
        return f"algorithm.denoising_step_list({', '.join(map(str, listed))}) names no step above 0, where there is something to learn; give one"
    if c.adapter is not None and c.adapter.dropout:
        return f"adapter.dropout({c.adapter.dropout}) with trainer score_distillation: its networks run as in generation, without dropout; set it to 0"
    for name, value, plain in ((f"training.{key}", getattr(t, key), plain) for key, plain in TEACHER_FORCED_ONLY.items()):
        if value != plain:
            return f"{name}({value}) with trainer score_distillation: trainer diffusion alone reads it; set it to {plain}"
    if t.optimizer != "adamw":
        return f"training.optimizer({t.optimizer}) with trainer score_distillation: student and critic learn with adamw; set it to adamw"
    return None
