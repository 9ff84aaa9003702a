"""Positions and gaps of the doubled sequence."""

import torch

from longlive.train.teacher_forcing import Film, draw_gaps, frame_positions, sequence_tokens


def test_cuts_and_gaps_add_to_positions_from_their_chunk_on():
    position = frame_positions([[False, True, False]], 2, 8.0, [[0, 0, 16]])
    assert position.dtype == torch.float64 and position.tolist() == [[0, 1, 10, 11, 28, 29]]


def test_gaps_stand_behind_anchor_and_last_pin_only():
    cuts = [False, False, True, False, True, False, False]
    for seed in range(20):
        gaps = draw_gaps(cuts, 4096, 8, True, torch.Generator().manual_seed(seed))
        assert [i for i, g in enumerate(gaps) if g] == [1, 5]
        assert all(g % 8 == 0 and 8 <= g <= 4096 for g in gaps if g)
    assert [i for i, g in enumerate(draw_gaps(cuts, 64, 8, False, torch.Generator().manual_seed(0))) if g] == [1]


def test_a_cut_in_the_last_chunk_and_a_film_of_one_chunk_have_nothing_behind_them():
    assert draw_gaps([False], 64, 8, True, torch.Generator().manual_seed(0)) == [0]
    assert [i for i, g in enumerate(draw_gaps([False, False, True], 64, 8, True, torch.Generator().manual_seed(0))) if g] == [1]


def test_all_copies_share_positions_and_prompts():
    film = Film(torch.tensor([[4, 5]]), frame_positions([[False, True]], 2, 8.0))
    tokens = sequence_tokens(film, 2, 4, 6)
    assert tokens.frames == 12 and tokens.frame_tokens == 6
    assert tokens.position_BF.tolist() == [[0, 1, 10, 11] * 3]
    assert tokens.prompt_BG.tolist() == [[4, 5] * 3]
    assert tokens.noisy_F.tolist() == [False] * 4 + [True] * 8 and tokens.chunk_F.tolist() == [0, 0, 1, 1] * 3
