"""Everything that a film needs and that does not change while it is made: networks, text encoder, size, rollout settings.

A `Pipeline` is a plain record of parts, so that tests and training build one from modules they already have. `Pipeline.load` is the
canonical order of the project, in one function: check -> build on meta -> load -> (merge LoRA) -> convert precision -> attach live LoRA -> join q, k, v.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from ..core.errors import InputError
from ..core.geometry import Geometry
from ..core.story import SCENE_CUT_PREFIX
from ..models.joint import join_projections
from ..models.lora import LoraStack
from ..models.spec import ModelSpec, model_spec
from ..parallel.mesh import Mesh
from ..precision.converter import share_activation_scales
from .decode import DecodeStage, decode_stage
from .naming import film_tag
from .rollout import RolloutSettings
from .session import Request, Session

SMALL_CHUNK = 4096  # tokens below which a forward takes longer to launch than to compute
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(kw_only=True)
class Pipeline:
    """The parts. `decode_kind` is "inline", "same-stream", "side-stream" or "other-device" (see `engine.decode`).

    dit on `device` in `dtype`; codec on its own device in its own dtype; `text_encoder.encode(prompts)` gives [n_i, text_dim] each.
    `cuda_graphs`: forwards are recorded and replayed (`engine.fixed`); "auto" on a GPU for chunks of at most `SMALL_CHUNK` tokens in all films together.
    `mesh`: the ranks that make each film together; all of them must make the same calls, and nothing is recorded.
    `weights` says where the weights came from (part -> path), for the receipt; `tag` is the last word of file names.
    """

    spec: ModelSpec
    dit: torch.nn.Module
    codec: object
    text_encoder: object
    geometry: Geometry
    settings: RolloutSettings
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    negative_prompt: str = ""
    scene_cut_prefix: str = SCENE_CUT_PREFIX
    decode_kind: str = "inline"
    cuda_graphs: bool | str = "auto"
    weights: dict[str, str] = field(default_factory=dict)
    tag: str = "regular"
    mesh: Mesh = Mesh()

    @classmethod
    def load(cls, config, device: str | torch.device | None = None, dtype: torch.dtype | None = None, mesh: Mesh | None = None) -> "Pipeline":
        """The pipeline that a `Config` describes, with its weights. Raises InputError before any weight is read where it can.

        `mesh`: the ranks that make a film together (`parallel.film_groups`); None: this process alone, for which sp_size x dp_size must be 1.
        """
        from ..config import availability
        from .adapters import configured_adapters
        from .parts import load_codec, load_dit, load_text_encoder

        availability(config, "generate")
        mesh = _alone(config) if mesh is None else mesh
        device = choose_device(config, device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # pinned buffers and kernels belong to this process's card
        net_dtype = dtype or choose_dtype(config, device)
        kind, place = decode_place(config, device) if mesh.sp_rank == 0 else ("inline", device)  # the first rank of a group decodes for it
        parts = cls.unloaded(config, device, net_dtype, kind)
        adapters = configured_adapters(config)
        dit, dit_path = load_dit(config, parts.spec, device, net_dtype, adapters)
        if device.type == "cuda":
            join_projections(dit)
        if mesh.sp_size > 1:
            share_activation_scales(dit, mesh.largest)
        spec = replace(parts.spec, dit=dit.dims)
        codec, vae_path = load_codec(config, spec, place, dtype)
        encoder, text_path = load_text_encoder(spec, device, net_dtype)
        paths = {"generator": dit_path, "vae": vae_path, "text_encoder": text_path}
        paths |= {f"lora.{adapter.name}": adapter.path for adapter, _ in adapters}
        weights = {part: str(path) for part, path in paths.items() if path}
        return replace(parts, spec=spec, dit=dit, codec=codec, text_encoder=encoder, weights=weights, mesh=mesh)

    @classmethod
    def unloaded(cls, config, device: torch.device, dtype: torch.dtype, decode_kind: str = "inline") -> "Pipeline":
        """Everything but the networks; no file is read."""
        _, _, _, height, width = config.data.image_or_video_shape
        return cls(
            spec=model_spec(config.model_kwargs.model_name),
            dit=None,
            codec=None,
            text_encoder=None,
            geometry=Geometry.of_latent(height, width),
            settings=rollout_settings(config),
            device=device,
            dtype=dtype,
            negative_prompt=config.inference.negative_prompt,
            scene_cut_prefix=config.data.scene_cut_prefix,
            decode_kind=decode_kind,
            cuda_graphs=config.inference.cuda_graphs,
            tag=film_tag(config),
        )

    def at_size(self, geometry: Geometry) -> "Pipeline":
        """The same networks for films of another size."""
        return replace(self, geometry=geometry)

    @property
    def lora(self) -> LoraStack:
        """The live adapters: `pipeline.lora.set_weight("style", 0.5)` holds from the next chunk on, for every session of this pipeline."""
        return LoraStack(self.dit)

    def records(self, films: int) -> bool:
        """Whether forwards for a batch of so many films are recorded."""
        if self.mesh.sp_size > 1:
            return False
        if self.device.type != "cuda" or self.cuda_graphs != "auto":
            return self.device.type == "cuda" and self.cuda_graphs is True
        return films * self.settings.chunk_frames * self.geometry.frame_tokens <= SMALL_CHUNK

    def session(self, request: Request) -> Session:
        """A fresh session for `request`."""
        return Session(self, request)

    def decode_stage(self) -> DecodeStage:
        """A fresh decoder of one film's (or one batch's) stream."""
        return decode_stage(self.decode_kind, self.codec)


def _alone(config) -> Mesh:
    """One process. Raises InputError where the configuration asks for several."""
    if config.sp_size * config.dp_size > 1:
        sizes = f"sp_size({config.sp_size}) x dp_size({config.dp_size}) = {config.sp_size * config.dp_size} processes"
        raise InputError(f"{sizes} make films with torchrun and inference_sp.py or longlive generate; set both to 1 here")
    return Mesh()


def rollout_settings(config) -> RolloutSettings:
    """The rollout settings that a `Config` describes."""
    i, m = config.inference, config.model_kwargs
    return RolloutSettings(
        chunk_frames=m.num_frame_per_block,
        window_frames=i.local_attn_size,
        sink_frames=i.sink_size,
        multi_shot=i.multi_shot_sink,
        shot_offset=i.multi_shot_rope_offset,
        recache=i.shot_clean_recache,
        relative=i.use_relative_rope,
        t_scale=i.inference_t_scale,
        steps=i.sampling_steps,
        shift=m.timestep_shift,
        guidance=i.guidance_scale,
        kv_format=i.kv_quant_format if i.kv_quant else None,
        kv_rule=i.kv_quant_scale_rule,
        kv_keep_sinks=i.kv_quant_keep_sinks,
        attention=i.attention,
    )


def choose_device(config, device: str | torch.device | None = None) -> torch.device:
    """`device`, or what the configuration names; auto takes the GPU where there is one. Raises InputError for a GPU that is not there."""
    from ..core.log import launch_rank

    name = str(device or config.inference.device)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{launch_rank()[2]}"
    return present(named_device(name, "inference.device"), "inference.device")


def named_device(name: str, key: str) -> torch.device:
    """The device of that name. Raises InputError for a word that names none."""
    try:
        return torch.device(name)
    except RuntimeError:
        raise InputError(f"{key} = {name!r} is no device; use cpu, cuda or cuda:N") from None


def present(device: torch.device, key: str) -> torch.device:
    """`device`, if this machine has it."""
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"{key} = {device}: this machine has {torch.cuda.device_count()} GPUs; use cpu, or one that is there")
    return device


def choose_dtype(config, device: torch.device) -> torch.dtype:
    """The precision that the configuration names; auto is bfloat16 on a GPU, float32 on a CPU."""
    name = config.inference.dtype
    return DTYPES[name] if name != "auto" else torch.bfloat16 if device.type == "cuda" else torch.float32


def decode_place(config, device: torch.device) -> tuple[str, torch.device]:
    """How and where frames are decoded (spec inference §6). `vae_device` and `async_vae` count only with `streaming_vae`.

    Decoding is always chunk by chunk, which gives the same frames as decoding at the end and needs constant memory.
    """
    i = config.inference
    if i.streaming_vae and i.vae_device:
        place = present(named_device(i.vae_device, "inference.vae_device"), "inference.vae_device")
        if place == torch.device("cuda"):
            place = choose_device(config, "cuda")  # the card of this process, as for inference.device
        if place.type == "cuda" and device.type == "cuda" and place != device:
            return "other-device", place
        if place.type != device.type:
            return "other-device", place
    if i.streaming_vae and i.async_vae and device.type == "cuda":
        return "side-stream", device
    return "inline", device
