"""Which chunks stay visible: a window of pages in which two kinds of page are safe from eviction.

A page holds the keys and values of one chunk. The *anchor* is chunk 0; the *pin* is the first chunk of the latest shot. A new chunk
takes a free slot or, when there is none, the slot of the oldest page that is neither. Nothing is ever moved. Pure Python, no tensors:
the stores only learn slot numbers. (Spec inference §2.4-2.6 and §12: same visible chunks as the published rolling buffer.)
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import InputError


@dataclass(frozen=True)
class Window:
    """Pages of one sample. `slots[i]` is the chunk in slot i (slots fill from 0 on, without gaps); `pinned` a chunk or None."""

    slots: tuple[int, ...] = ()
    pinned: int | None = None

    def slot(self, chunk: int) -> int:
        return self.slots.index(chunk)

    @property
    def order(self) -> tuple[int, ...]:
        """The chunks from oldest to newest."""
        return tuple(sorted(self.slots))


@dataclass(frozen=True, kw_only=True)
class WindowPolicy:
    """`pages` pages in all; keep the anchor; pin the latest cut chunk; `recache`: a cut drops all pages but the anchor and its own."""

    pages: int
    anchor: bool
    pin: bool
    recache: bool = False

    def __post_init__(self):
        if self.pages < 1:
            raise InputError(f"a window of {self.pages} pages: at least one is needed, for the chunk that is generated")

    def open(self, window: Window, chunk: int) -> Window:
        """The window in which `chunk` is denoised: its slot is free, or taken from the page that goes."""
        if len(window.slots) < self.pages:
            return Window((*window.slots, chunk), window.pinned)
        victim = self._victim(window)
        slots = tuple(chunk if c == victim else c for c in window.slots)
        return Window(slots, None if window.pinned == victim else window.pinned)

    def close(self, window: Window, chunk: int, cut: bool) -> Window:
        """The window in which the finished `chunk` is committed, after which it stays. `cut`: the chunk begins a shot."""
        if not cut or chunk == 0:
            return window
        slots = window.slots
        if self.recache:
            slots = (0, chunk) if self.anchor and self.pages > 1 else (chunk,)
        return Window(slots, chunk if self.pin else None)

    def _victim(self, window: Window) -> int:
        """The oldest page that is neither anchor nor pin; in a window too small for both, the pin goes first."""
        protected = {0} if self.anchor else set()
        free = [c for c in window.order if c not in protected and c != window.pinned]
        return (free or [c for c in window.order if c not in protected] or list(window.order))[0]


def history(cuts: list[bool], policy: WindowPolicy) -> list[tuple[Window, Window]]:
    """(window while denoising, window while committing) of every chunk of a film whose chunk i begins a shot when `cuts[i]`."""
    window, windows = Window(), []
    for chunk, cut in enumerate(cuts):
        opened = policy.open(window, chunk)
        window = policy.close(opened, chunk, cut)
        windows.append((opened, window))
    return windows


def visible_chunks(cuts: list[bool], policy: WindowPolicy, *, commit: bool = False) -> list[tuple[int, ...]]:
    """The chunks that each chunk sees while it is denoised (`commit`: while its clean latents are committed), own last."""
    return [windows[commit].order for windows in history(cuts, policy)]
