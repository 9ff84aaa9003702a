"""What a model is: sizes, where its files belong, and which of its parts other folders may touch.

`parallel/`, `precision/` and LoRA never import a model file; they meet it through the name patterns of its `ModelSpec`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import InputError, nearest


@dataclass(frozen=True, kw_only=True)
class DiTDims:
    """Sizes of the Wan DiT (spec inference §1.1). `channels` are latent channels, in and out; patch is (1, 2, 2)."""

    dim: int
    ffn: int
    layers: int
    heads: int
    text_dim: int
    text_len: int
    freq_dim: int = 256
    channels: int = 48
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclass(frozen=True, kw_only=True)
class VAEDims:
    """Sizes of the Wan2.2 VAE (spec inference §5.1). Bases are the channel counts of the first encoder / last decoder stage."""

    encoder_base: int
    decoder_base: int
    z_dim: int = 48
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    temporal_down: tuple[bool, ...] = (False, True, True)

    def pruned(self, rate: float) -> "VAEDims":
        """LightVAE: the same graph with both bases scaled by 1 - rate (spec inference §5.5)."""
        from dataclasses import replace

        return replace(self, encoder_base=round(self.encoder_base * (1 - rate)), decoder_base=round(self.decoder_base * (1 - rate)))


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model by name.

    `folder` is where its files belong, relative to the working directory ("" = inside the package's assets).
    `height`, `width` in pixels are the size it was trained at; `window_chunks` the chunks that attention sees.
    `linear_patterns` are fnmatch patterns of Linear modules inside the DiT that LoRA and precision converters may take.
    `block_patterns` name its transformer blocks, `entry_patterns` the parts that are also called outside its forward (`parallel.fsdp`).
    """

    name: str
    dit: DiTDims
    vae: VAEDims
    text_kind: str
    folder: str
    height: int
    width: int
    window_chunks: int = 4
    linear_patterns: tuple[str, ...] = (
        "blocks.*.self_attn.[qkvo]",
        "blocks.*.cross_attn.[qkvo]",
        "blocks.*.ffn.0",
        "blocks.*.ffn.2",
    )
    block_patterns: tuple[str, ...] = ("blocks.*",)
    entry_patterns: tuple[str, ...] = ("text_embedding",)


WAN22_VAE = VAEDims(encoder_base=160, decoder_base=256)

WAN22_TI2V_5B = ModelSpec(
    name="wan2.2-ti2v-5b",
    dit=DiTDims(dim=3072, ffn=14336, layers=30, heads=24, text_dim=4096, text_len=512),
    vae=WAN22_VAE,
    text_kind="umt5-xxl",
    folder="wan_models/Wan2.2-TI2V-5B",
    height=704,
    width=1280,
)

TINY = ModelSpec(
    name="tiny",
    dit=DiTDims(dim=256, ffn=1024, layers=8, heads=4, text_dim=320, text_len=64),
    vae=VAEDims(encoder_base=16, decoder_base=24),
    text_kind="hashed-words",
    folder="",
    height=192,
    width=320,
)

MODELS = {spec.name: spec for spec in (WAN22_TI2V_5B, TINY)}


@dataclass(frozen=True, kw_only=True)
class VAEType:
    """One value of the configuration key `vae_type`: its file, and the share of channels that is pruned away (spec inference §5.5)."""

    path: str
    rate: float = 0.0


VAE_TYPES = {
    "wan": VAEType(path=f"{WAN22_TI2V_5B.folder}/Wan2.2_VAE.pth"),
    "mg_lightvae": VAEType(path="wan_models/Matrix-Game-3.0/MG-LightVAE.pth", rate=0.5),
    "mg_lightvae_v2": VAEType(path="wan_models/Matrix-Game-3.0/MG-LightVAE_v2.pth", rate=0.75),
}
VAE_ALIASES = {"": "wan", "wan2.2": "wan"}


def model_spec(name: str) -> ModelSpec:
    """The spec of `name`, in any letter case ("Wan2.2-TI2V-5B" or "tiny"). Raises InputError that lists the names."""
    key = name.lower()
    if key not in MODELS:
        close = nearest(key, MODELS)
        raise InputError(f"unknown model {name!r}{f'; did you mean {close!r}?' if close else ''} (known: {', '.join(MODELS)})")
    return MODELS[key]


def vae_type(name: str) -> VAEType:
    """The entry for `vae_type`. Raises InputError that lists the names."""
    key = VAE_ALIASES.get(name.lower(), name.lower())
    if key not in VAE_TYPES:
        close = nearest(key, VAE_TYPES)
        raise InputError(f"unknown vae_type {name!r}{f'; did you mean {close!r}?' if close else ''} (known: {', '.join(VAE_TYPES)})")
    return VAE_TYPES[key]
