"""The page policy sees the chunks that the published rolling buffer sees."""

import random

import pytest

from longlive.cache.attend import visible_tensor
from longlive.cache.policy import WindowPolicy, history, visible_chunks
from longlive.core.errors import InputError


def rolling_buffer(cuts, pages, sink, multi_shot, recache):
    """The published index arithmetic (spec inference §2.3-2.6) in units of chunks: (denoising buffer, committed buffer) per chunk."""
    g = 1 if sink and multi_shot else 0
    buffer, pin, seen = [], None, []
    for chunk, cut in enumerate(cuts):
        cut = cut and chunk > 0
        if len(buffer) == pages:
            protected = g + 1 if pin == g and pin is not None else (g if pin is not None else max(g, int(sink)))
            protected = min(protected, pages - 1)
            del buffer[protected]
            if pin is not None and pin > protected:
                pin -= 1
        buffer.append(chunk)
        denoising = tuple(buffer)
        if cut and recache:
            buffer, pin = [*buffer[: int(sink)], chunk], None
        if cut and multi_shot and sink:
            pin = len(buffer) - 1
        seen.append((denoising, tuple(buffer)))
    return seen


def test_worked_example_of_the_specification():
    cuts = [c in (3, 6) for c in range(11)]
    policy = WindowPolicy(pages=4, anchor=True, pin=True)
    assert visible_chunks(cuts, policy) == [
        (0,), (0, 1), (0, 1, 2), (0, 1, 2, 3), (0, 2, 3, 4), (0, 3, 4, 5), (0, 3, 5, 6), (0, 5, 6, 7), (0, 6, 7, 8), (0, 6, 8, 9), (0, 6, 9, 10),
    ]  # fmt: skip


def test_recache_example():
    cuts = [c in (3, 6) for c in range(8)]
    policy = WindowPolicy(pages=4, anchor=True, pin=True, recache=True)
    assert visible_chunks(cuts, policy)[3:] == [(0, 1, 2, 3), (0, 3, 4), (0, 3, 4, 5), (0, 3, 5, 6), (0, 6, 7)]
    assert visible_chunks(cuts, policy, commit=True)[3] == (0, 3)
    assert visible_chunks(cuts, policy, commit=True)[6] == (0, 6)


@pytest.mark.parametrize("multi_shot", [False, True])
@pytest.mark.parametrize("recache", [False, True])
def test_random_cuts_see_what_the_rolling_buffer_sees(multi_shot, recache):
    draw = random.Random(5)
    for _ in range(400):
        pages, sink = draw.randint(3, 6), multi_shot or draw.random() < 0.5
        cuts = [draw.random() < draw.choice((0.1, 0.5)) for _ in range(30)]
        policy = WindowPolicy(pages=pages, anchor=sink, pin=sink and multi_shot, recache=recache)
        ours = [(opened.order, closed.order) for opened, closed in history(cuts, policy)]
        assert ours == rolling_buffer(cuts, pages, sink, multi_shot, recache), (pages, sink, cuts)


@pytest.mark.parametrize("pages", [1, 2])
def test_small_windows_never_lose_the_own_chunk(pages):
    policy = WindowPolicy(pages=pages, anchor=True, pin=True, recache=True)
    for chunk, (opened, closed) in enumerate(history([True] * 6, policy)):
        assert chunk in opened.slots and chunk in closed.slots
        assert len(opened.slots) <= pages


def test_slots_fill_without_gaps_and_pages_stay_where_they_are():
    policy = WindowPolicy(pages=4, anchor=True, pin=True)
    windows = [closed for _, closed in history([c in (3, 6) for c in range(20)], policy)]
    for before, after in zip(windows, windows[1:]):
        assert sum(a != b for a, b in zip(before.slots, after.slots)) <= 1


def test_visible_tensor_pads_and_leaves_the_own_chunk_out():
    visible = visible_tensor([[False] * 4, [False, False, True, False]], WindowPolicy(pages=3, anchor=True, pin=True))
    assert visible.tolist() == [[[-1, -1], [0, -1], [0, 1], [0, 2]], [[-1, -1], [0, -1], [0, 1], [0, 2]]]


def test_no_pages_is_refused():
    with pytest.raises(InputError, match="at least one"):
        WindowPolicy(pages=0, anchor=False, pin=False)
