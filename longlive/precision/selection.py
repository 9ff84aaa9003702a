"""Which linear layers are quantised: all but those that a list of names keeps in bf16.

An entry is a module's exact name, or `re:` and a regular expression that is searched in it (the documented `model_quant_filtered_modules`, spec nvfp4 §3).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from ..core.errors import ConfigError, nearest

# The documented default. Embeddings, the time projection and the head; entries of what is no linear layer say so for readers of the list.
DEFAULT_FILTER = (
    "text_embedding.0", "text_embedding.2", "patch_embedding", "time_projection.1", "time_embedding.0", "time_embedding.2", "head.head", "head.modulation",
    r"re:.*\.norm_k$", r"re:.*\.norm_q$", r"re:.*\.norm1$", r"re:.*\.norm2$", r"re:.*\.norm3$",
)  # fmt: skip
REGULAR = "re:"


def matches(name: str, entry: str) -> bool:
    """Whether `entry` names the module `name`. Raises ConfigError for a broken regular expression."""
    if not entry.startswith(REGULAR):
        return name == entry
    try:
        return re.search(entry.removeprefix(REGULAR), name) is not None
    except re.error as error:
        raise ConfigError(f"{entry!r} is no regular expression ({error}); mend it in the list of filtered modules") from None


def filtered(names: Iterable[str], entries: Sequence[str]) -> list[str]:
    """Those of `names` that an entry names, in order."""
    return [name for name in names if any(matches(name, entry) for entry in entries)]


def quantised_linears(model: nn.Module, extra: Sequence[str] = (), *, default: bool = True) -> list[str]:
    """Names of the linear layers to quantise: all but what `extra` and (with `default`) `DEFAULT_FILTER` name.

    Raises ConfigError for an entry of `extra` that names no module, and when nothing is left to quantise.
    """
    modules = dict(model.named_modules())
    for entry in extra:
        if not filtered(modules, [entry]):
            close = nearest(entry, modules)
            hint = f"did you mean {close}?" if close else "see the model's module names"
            raise ConfigError(f"the filtered module {entry!r} is no module of the model; {hint}")
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    kept = set(filtered(linears, [*extra, *(DEFAULT_FILTER if default else ())]))
    chosen = [name for name in linears if name not in kept]
    if not chosen:
        raise ConfigError(f"all {len(linears)} linear layers are filtered, so that nothing would be quantised; shorten the list of filtered modules")
    return chosen
