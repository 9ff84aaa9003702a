"""`Config`: all sections and the documented top-level keys, frozen, with the origin of every value."""

from __future__ import annotations

from typing import Literal

from pydantic import PrivateAttr

from .generation import Checkpoints, Data, Inference
from .model import Adapter, ModelKwargs
from .section import Section, option
from .training import Algorithm, Evaluation, Infra, Logging, Training
from .world import VAE, World


class Config(Section):
    """A complete, checked configuration. Built by `load_config` or `default_config`, never by hand."""

    model_kwargs: ModelKwargs
    real_model_kwargs: ModelKwargs | None = option(None, "distillation: the teacher's model_kwargs; null = model_kwargs")
    fake_model_kwargs: ModelKwargs | None = option(None, "distillation: the critic's model_kwargs; null = model_kwargs")
    data: Data
    inference: Inference
    checkpoints: Checkpoints
    adapter: Adapter | None = option(None, "LoRA; the section's presence turns it on")
    infra: Infra
    algorithm: Algorithm
    training: Training
    evaluation: Evaluation
    logging: Logging
    world: World
    vae: VAE

    num_output_frames: int | None = option(None, "latent frames of a film, whole chunks; null = image_or_video_shape[1]", ge=1)
    output_folder: str = option("videos/longlive2", "where films are written")
    inference_iter: int = option(-1, "stop after this prompt index; -1 = all", ge=-1)
    save_with_index: bool = option(False, "name films by index instead of by prompt")
    save_latents_only: bool = option(False, "write latents instead of videos")
    merge_lora: bool = option(False, "merge the LoRA into the weights before running")
    fp8_quant: bool = option(False, "FP8 weights and activations; the layers are chosen by the model_quant lists")
    fp8_backend: Literal["fp8", "torchao"] | None = option(None, "how FP8 is computed; null = fp8")
    torch_compile: bool | Literal["auto"] = option(False, "auto and false: nothing is compiled, kernels are fused by hand; true is refused in generation")
    torch_compile_min_samples: int = option(2, "auto: least number of films", ge=0)
    torch_compile_target: str = option("generator_model", "what is compiled")
    torch_compile_backend: str = option("inductor", "compiler backend")
    torch_compile_mode: str | None = option("max-autotune-no-cudagraphs", "compiler mode")
    torch_compile_fullgraph: bool = option(False, "refuse graph breaks")
    torch_compile_dynamic: bool | None = option(False, "dynamic shapes")
    torch_compile_options: dict | None = option(None, "compiler options")
    torch_compile_suppress_errors: bool = option(True, "fall back to eager on a compiler error")
    sp_size: int = option(1, "ranks that share one film: 1, 2, 4 or 8", ge=1)
    dp_size: int = option(1, "groups of ranks that take different prompts", ge=1)
    auto_sp_remainder: bool = option(False, "let left-over ranks form smaller groups")
    model_num_heads: int = option(24, "attention heads that sequence parallelism splits", ge=1)

    _given: dict = PrivateAttr(default_factory=dict)
    _provenance: dict = PrivateAttr(default_factory=dict)
    _source: str = PrivateAttr(default="")

    @property
    def provenance(self) -> dict[str, str]:
        """Dotted key -> "default", "preset NAME", the file's path, or "override"."""
        return dict(self._provenance)

    @property
    def source(self) -> str:
        """The file that was loaded; "" when there was none."""
        return self._source

    @property
    def chunk_frames(self) -> int:
        """Latent frames of one chunk."""
        return self.model_kwargs.num_frame_per_block

    def with_overrides(self, overrides: list[str]) -> "Config":
        """A new configuration with `key=value` overrides on top; defaults that depend on others are derived anew."""
        from .load import load_config

        return load_config(self, overrides)
