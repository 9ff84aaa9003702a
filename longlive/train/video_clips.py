"""Folders of videos, or shards of them, as a source of clips: decoded ahead by workers, encoded and read on the device.

Ranks that share a sample read the same files and encode it together; they check that they hold the same one.
"""

from __future__ import annotations

import hashlib

import torch

from ..config.root import Config
from ..core.errors import ConfigError, InputError, LongLiveError
from ..core.log import logger
from ..data.loader import BatchLoader
from ..data.open import loader_settings, open_manifest, open_source
from ..data.samples import VideoBatch
from ..data.shards import ShardSource, StoredText
from ..models.spec import DiTDims, ModelSpec
from ..models.text import PromptCache, TextEncoder, text_encoder
from ..models.weights import weights_hash
from ..parallel.mesh import Mesh
from .clips import Clips, FrozenParts, PaddedText, Words
from .shared_encode import encode_shared
from .start import codec_for_training, training_vae
from .trainer import Draw


class VideoClips:
    """Satisfies `clips.ClipSource`. Raises InputError or ConfigError for data that cannot be trained on, before any weight is read."""

    def __init__(self, config: Config, spec: ModelSpec, device: torch.device, mesh: Mesh):
        self.config, self.spec, self.device, self.mesh = config, spec, device, mesh
        self.frames = config.data.image_or_video_shape[1]
        if config.training.character_weight != 1:
            weight = config.training.character_weight
            raise ConfigError(f"training.character_weight({weight}) needs to know where characters are, which videos do not tell; set it to 1.0")
        self.source = self._open()
        self.settings = loader_settings(config, pin=device.type == "cuda")
        self.loader: BatchLoader | None = None
        self.position: int | None = None
        self.title = f"{len(self.source)} folders of {config.data.data_path}{'' if config.data.load_raw_video else ' (shards)'}"
        logger.info("training on %s", self.title)

    def _open(self):
        config, vae = self.config, training_vae(self.config, self.spec)
        if config.data.load_raw_video and self.mesh.size > 1:  # one rank opens every file, the others read its index
            if self.mesh.dp_rank == self.mesh.sp_rank == 0:
                open_manifest(config)
            self.mesh.sum(torch.zeros(1))
        if config.data.load_raw_video and not vae.exists():
            raise InputError(f"the VAE {vae} is missing; put it there (`longlive doctor` says where from), or train from shards")
        codec = weights_hash(vae) if not config.data.load_raw_video and vae.exists() else None
        return open_source(config, config.logging.seed, codec=codec)

    def load(self, dims: DiTDims) -> None:
        config = self.config
        dtype = torch.bfloat16 if config.infra.mixed_precision and self.device.type == "cuda" else torch.float32
        self.codec = codec_for_training(config, self.device, dtype) if config.data.load_raw_video else None
        self.text = PaddedText(dims, self._text_encoder(dims), dtype, self.device)

    def _text_encoder(self, dims: DiTDims) -> TextEncoder:
        if self._stored_words():
            stored = StoredText(self.config.data.data_path, self.device)
            if (stored.text_dim, stored.text_len) != (dims.text_dim, dims.text_len):
                theirs, ours = f"{stored.text_dim} x {stored.text_len}", f"{dims.text_dim} x {dims.text_len}"
                raise InputError(f"the text shards in {stored.root} are {theirs}, the model reads {ours}; run `longlive encode` for this model")
            return PromptCache(stored)
        if self.config.infra.text_encoder_cpu_offload:
            return text_encoder(self.spec, device="cpu")
        return text_encoder(self.spec, device=self.device, dtype=torch.bfloat16 if self.device.type == "cuda" else torch.float32)

    def frozen_parts(self) -> FrozenParts:
        stored = self._stored_words()
        umt5 = self.spec.text_kind == "umt5-xxl" and not stored and not self.config.infra.text_encoder_cpu_offload
        return FrozenParts(self.codec, None if stored else self.text.encoder, umt5)

    def _stored_words(self) -> bool:
        return isinstance(self.source, ShardSource) and self.source.index.text is not None

    def prepare(self) -> None:
        pass

    def example(self, number: int) -> Clips:
        batch, chunks = self.config.training.batch_size, self.frames // self.config.chunk_frames
        shape = (batch, self.frames, *self.config.data.image_or_video_shape[2:])
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(1000 + number)).to(self.device)  # not the seed of the noise
        cuts = tuple(tuple(chunk > 0 and chunk % 3 == 0 for chunk in range(chunks)) for _ in range(batch))
        prompts = (("",) * chunks,) * batch
        return Clips(latents_BFCHW=latents, mask_BF=torch.ones(shape[:2], device=self.device), cuts=cuts, prompts=prompts)

    def draw(self, draw: Draw) -> Clips:
        batch = self._next(draw)
        if batch.latents_BFCHW is None:
            batch = batch.with_latents(encode_shared(self.codec, batch.frames_BTHW3, self.mesh, self.config.infra.vae_halo_latents))
        batch = batch.to(self.device)
        return Clips(latents_BFCHW=batch.latents_BFCHW, mask_BF=batch.mask_BF(self.device), cuts=batch.cuts, prompts=batch.prompts)

    def _next(self, draw: Draw) -> VideoBatch:
        if self.loader is None:
            training, streams = self.config.training, self.mesh.dp_size
            taken = (draw.step * training.gradient_accumulation_steps + draw.micro) * training.batch_size * streams
            start = taken if self.position is None else self.position
            self.loader = BatchLoader(self.source, self.settings, stream=self.mesh.dp_rank, streams=streams, position=start)
        batch = next(self.loader)
        self.position = self.loader.position
        self._agree(batch)
        return batch

    def _agree(self, batch: VideoBatch) -> None:
        """Raises LongLiveError unless the ranks that share this batch all read the same one."""
        if self.mesh.sp_size == 1:
            return
        facts = repr((batch.numbers, batch.names, batch.prompts, batch.cuts, batch.valid_chunks)).encode("utf-8", "surrogatepass")
        own = torch.tensor([int.from_bytes(hashlib.sha256(facts).digest()[:7], "big")])
        if len(set(self.mesh.gather(own).flatten().tolist())) > 1:
            raise LongLiveError(f"ranks that share a sample read different ones ({batch.names[0]} here); give all of them the same data, readable by each")

    def words(self, clips: Clips, dropped_B: torch.Tensor, draw: Draw) -> Words:
        return self.text.dropped(self.text.rows([prompt for prompts in clips.prompts for prompt in prompts]), dropped_B)

    def state(self) -> dict:
        return {"position": self.position or 0}

    def restore(self, state: dict) -> None:
        self.position, self.loader = state["position"], None
