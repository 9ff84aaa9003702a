"""What training takes from the settings of generation: with a window everything, else nothing that films of an evaluation are made with."""

import pytest

from longlive.config import load_config
from longlive.engine.pipeline import rollout_settings
from longlive.train.view import training_view, visible_chunks

CUTS = [[False, False, True, False, False]]
FILMS = {
    "model_kwargs": {"model_name": "tiny", "num_frame_per_block": 8, "t_scale": 0.5},
    "algorithm": {"teacher_forcing": True},
    "inference": {"local_attn_size": 24, "sink_size": 8, "multi_shot_sink": True, "use_relative_rope": True, "inference_t_scale": 0.25},
}


def test_settings_of_films_do_not_change_what_is_trained():
    config = load_config(FILMS)
    view = training_view(config)
    assert (view.relative, view.t_scale) == (False, 0.5)
    assert visible_chunks(config, view, CUTS) == (None, None)
    assert rollout_settings(config).relative and rollout_settings(config).t_scale == 0.25


@pytest.mark.parametrize("recache", [False, True])
def test_a_window_is_trained_as_it_is_served(recache):
    config = load_config(FILMS, ["training.visibility=window", f"inference.shot_clean_recache={str(recache).lower()}"])
    view = training_view(config)
    assert view == rollout_settings(config) and view.relative and view.t_scale == 0.25
    visible, committed = visible_chunks(config, view, CUTS)
    assert [[c for c in row if c >= 0] for row in visible[0].tolist()] == [[], [0], [0, 1], [0, 2], [0, 2]]
    assert (committed is not None) == recache
