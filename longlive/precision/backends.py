"""The ways to compute a quantised linear layer, what each needs, and the choice among them: explicit or by capability, never silent.

name       weights   activations   computed by                                     runs on
fp8        FP8       FP8           scaled_mm, one scale a row, fast accumulation   Ada, Hopper, Blackwell; reference on a CPU
torchao    FP8       FP8           the package, as a cross-check                   Ada, Hopper, Blackwell
w4a8       NVFP4     FP8           FP8 made from packed weights for each product   as fp8
w4a16      NVFP4     unchanged     weights dequantised for each product            everywhere
native     NVFP4     NVFP4         FP4 tensor cores through scaled_mm              Blackwell
emulated   NVFP4     NVFP4         the numbers of `native`, up to the order of     everywhere
                                   addition, in bfloat16 products
te         NVFP4     NVFP4         TransformerEngine, from merged weights          datacentre Blackwell
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..core.errors import ConfigError
from .capability import ADA, AMPERE, BLACKWELL, BLACKWELL_CONSUMER, CPU, FP4_FAMILIES, FP8_FAMILIES, HOPPER, Capability

# keys and values of the text, made once a prompt: in FP8 they cost a fifth of a forward's squared error and save no time
TEXT = (r"re:\.cross_attn\.[kv]$",)
FP8, TORCHAO, W4A8, W4A16, NATIVE, EMULATED, TE = "fp8", "torchao", "w4a8", "w4a16", "native", "emulated", "te"


@dataclass(frozen=True, kw_only=True)
class Backend:
    """`weights`: format kept in memory. `words`: what it is, for people. `lacks`: why a device cannot, or None. `instead`: what to set then.

    `spares`: layers (as in a list of filtered modules) that stay as they are unless the default filter is off.
    """

    name: str
    weights: str
    words: str
    lacks: Callable[[Capability], str | None]
    instead: str
    spares: tuple[str, ...] = ()


def _fp8(c: Capability) -> str | None:
    if c.family not in (*FP8_FAMILIES, CPU):
        return f"{c.name} ({c.family}) has no FP8 tensor cores: they come with Ada, Hopper and Blackwell"
    return None if c.family == CPU or c.scaled_mm else "this torch has no scaled_mm"


def _torchao(c: Capability) -> str | None:
    if not c.torchao:
        return "torchao is not installed (pip install torchao)"
    return _fp8(c) if c.family != CPU else "torchao computes FP8 on GPUs"


def _native(c: Capability) -> str | None:
    if c.family not in FP4_FAMILIES:
        return f"{c.name} ({c.family}) has no FP4 tensor cores: they come with Blackwell"
    return None if c.scaled_mm_blocks else "this torch has no torch.nn.functional.scaled_mm with block scales"


def _te(c: Capability) -> str | None:
    if not c.transformer_engine:
        return "TransformerEngine is not installed (pip install transformer-engine[pytorch])"
    return None if c.family == BLACKWELL else f"TransformerEngine computes NVFP4 on datacentre Blackwell only, and this is {c.name} ({c.family})"


BACKENDS = {
    b.name: b
    for b in (
        Backend(name=FP8, weights="fp8", words="FP8 weights and activations", lacks=_fp8, instead="set fp8_quant: false to run in bf16", spares=TEXT),
        Backend(name=TORCHAO, weights="torchao", words="FP8 by torchao", lacks=_torchao, instead="set fp8_backend: null", spares=TEXT),
        Backend(name=W4A8, weights="nvfp4", words="NVFP4 weights computed in FP8", lacks=_fp8, instead="set model_quant_backend: w4a16"),
        Backend(name=W4A16, weights="nvfp4", words="NVFP4 weights, products in full precision", lacks=lambda c: None, instead=""),
        Backend(name=NATIVE, weights="nvfp4", words="NVFP4 weights and activations", lacks=_native, instead="set model_quant_backend: w4a8 or emulated"),
        Backend(name=EMULATED, weights="nvfp4", words="NVFP4 weights and activations, emulated", lacks=lambda c: None, instead=""),
        Backend(
            name=TE, weights="te", words="NVFP4 by TransformerEngine", lacks=_te,
            instead="set model_quant_use_transformer_engine: false (or model_quant_te_fallback_to_fouroversix: true) to use our own backends",
        ),
    )
}  # fmt: skip
PACKED = tuple(name for name, backend in BACKENDS.items() if backend.weights == "nvfp4")
FLOATING = (FP8, TORCHAO)
# published names of the same thing
ALIASES = {"pytorch": EMULATED, "cutlass": NATIVE, "transformer_engine": TE}
BEST_PACKED = {
    CPU: W4A16, AMPERE: W4A16, ADA: W4A8, HOPPER: W4A8, BLACKWELL: NATIVE, BLACKWELL_CONSUMER: NATIVE,
}  # fmt: skip


def choose(wanted: str | None, key: str, allowed: tuple[str, ...], best: str, capability: Capability) -> Backend:
    """The backend that `key` of the configuration names; None: `best`. Raises ConfigError with the reason and the alternative where it cannot run."""
    name = ALIASES.get(wanted, wanted) or best
    if name not in allowed:
        raise ConfigError(f"{key} = {wanted!r} is none of {', '.join(allowed)}; leave it out for the best one of this machine")
    backend = BACKENDS[name]
    reason = backend.lacks(capability)
    if reason is not None:
        raise ConfigError(f"{backend.words} ({name}) cannot run here: {reason}; {backend.instead}")
    return backend


def best_packed(capability: Capability) -> str:
    """The backend for NVFP4 weights that a family is fastest with."""
    best = BEST_PACKED.get(capability.family, W4A16)
    return best if BACKENDS[best].lacks(capability) is None else W4A16
