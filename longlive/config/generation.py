"""`data`, `inference` and `checkpoints`: what is read, and how a film is generated."""

from __future__ import annotations

from typing import Literal

from ..core.story import SCENE_CUT_PREFIX
from .section import Section, option

NEGATIVE_PROMPT = (
    "色调艳丽,过曝,静态,细节模糊不清,字幕,风格,作品,画作,画面,静止,整体发灰,最差质量,低质量,JPEG压缩残留,丑陋的,残缺的,多余的手指,"
    "画得不好的手部,画得不好的脸部,畸形的,毁容的,形态畸形的肢体,手指融合,静止不动的画面,杂乱的背景,三条腿,背景人很多,倒着走"
)


class Data(Section):
    data_path: str | None = option(None, "prompts: a .txt file or a folder of captions; training: a folder with video/ and caption/")
    eval_data_path: str | None = option(None, "prompts of the evaluation during training; null = data_path")
    image_or_video_shape: tuple[int, int, int, int, int] = option((1, 128, 48, 44, 80), "[B, F, C, H, W] in latents; H, W x 16 = pixels")
    load_raw_video: bool = option(True, "training reads video files (false: latents)")
    scene_cut_prefix: str = option(SCENE_CUT_PREFIX, "text put before the first prompt of every later shot")
    chunks_per_shot: int = option(0, "chunks of every shot where no shot_durations.txt says so; 0 = even split", ge=0)
    max_chunks_per_shot: int = option(0, "video folders: a virtual cut after so many chunks; 0 = never", ge=0)
    allow_padding: bool = option(False, "video folders: repeat the last frame of clips that are too short")
    min_latent_frames: int = option(0, "video folders with padding: least valid latent frames", ge=0)
    uniform_prompt: bool = option(False, "video folders: stay within one file")
    manifest_path: str | None = option(None, "video folders: file that keeps their index; null = beside the data")
    num_workers: int = option(2, "video folders: processes that decode ahead of each rank; 0 = decode in the rank itself", ge=0)
    prefetch_factor: int = option(2, "video folders: batches that each of them decodes ahead", ge=1)
    max_broken_clips: int = option(100, "video folders: clips that may be unreadable before training stops; each is named", ge=0)
    dataset_sample_warning_seconds: float = option(60, "warn when one sample takes longer", gt=0)
    dataset_sample_warning_interval_seconds: float = option(60, "and again after so long", gt=0)


class Inference(Section):
    sampling_steps: int = option(50, "denoising steps of a chunk (distilled models: 4 or 2)", ge=1, le=1000)
    guidance_scale: float = option(1.0, "classifier-free guidance; 1 = off", ge=0)
    negative_prompt: str = option(NEGATIVE_PROMPT, "text of the negative branch")
    sink_size: int | None = option(None, "latent frames kept at the start of the window; null = model_kwargs.sink_size", ge=0)
    local_attn_size: int | None = option(None, "attention window in latent frames; null = model_kwargs.local_attn_size", ge=-1)
    multi_shot_sink: bool = option(False, "keep the first chunk of the film and of the current shot in the window")
    multi_shot_rope_offset: float = option(0.0, "latent frames added to the positions at each cut")
    shot_clean_recache: bool = option(False, "drop the previous shot from the window once a cut chunk is finished")
    use_relative_rope: bool = option(False, "positions inside the window instead of positions in the film")
    inference_t_scale: float | None = option(None, "scale of temporal RoPE positions; null = model_kwargs.t_scale")
    streaming_vae: bool = option(False, "decode chunk by chunk")
    async_vae: bool = option(False, "with streaming_vae: decode while the next chunk is generated")
    vae_device: str | None = option(None, "with streaming_vae: decode on this device")
    vae_type: Literal["wan", "wan2.2", "", "mg_lightvae", "mg_lightvae_v2"] = option("wan", "decoder")
    vae_fp8: bool = option(False, "the decoder's residual and doubling convolutions in FP8: tensor cores of Hopper and datacentre Blackwell, emulated on a CPU")
    vae_tile_rows: int | None = option(None, "for cards with little memory: decode a latent frame at a time, at the end in tiles of so many latent rows", ge=1)
    num_samples: int = option(1, "films per prompt, generated as one batch", ge=1)
    use_ema: bool = option(False, "take the EMA weights of the checkpoint")
    kv_quant: bool = option(False, "keep cached keys and values quantised")
    kv_quant_format: Literal["nvfp4", "fp8", "int8"] = option("nvfp4", "number format of the quantised cache")
    kv_quant_keep_sinks: bool = option(False, "quantised cache: the first chunk of the film and of the shot stay in full precision")
    kv_quant_scale_rule: Literal["static_6", "static_4", "mse", "mae", "abs_max"] = option("mse", "scale rule of the quantised cache")
    kv_quant_backend: Literal["cuda", "triton", "pytorch"] = option("cuda", "documented, without effect: a GPU takes fused kernels, a CPU torch's")
    attention: Literal["auto", "fp8"] = option("auto", "self-attention: auto, or products in FP8 (Hopper and datacentre Blackwell; rounded inputs on a CPU)")
    device: str = option("auto", "auto, cpu, cuda or cuda:N", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    cuda_graphs: bool | Literal["auto"] = option("auto", "record forwards on a GPU and replay them; auto = for small chunks, whose launches take longest")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "precision of the networks; auto = bfloat16 on a GPU")


class Checkpoints(Section):
    generator_ckpt: str | None = option(None, "weights of the generator; null = the base model (tiny: the weights in the package)")
    lora_ckpt: str | tuple[str, ...] | None = option(None, "LoRA weights for the adapter section, a file or tiny-4steps, tiny-2steps; a list stacks several")
    vae_ckpt: str | None = option(None, "weights of the VAE; null = the model's own")
    real_score_ckpt: str | None = option(None, "distillation: weights of the teacher")
    fake_score_ckpt: str | None = option(None, "distillation: weights the critic starts from")
