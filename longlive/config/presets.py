"""What a model's name decides: its latent size, and the settings it was released with.

`SHAPES` applies wherever the model is named. `RELEASED` are the settings a model is meant to run with: `default_config` uses them, and so does
every configuration that names `tiny`. A published file for the 5B model says everything itself: a key it leaves out has the documented default.
"""

from __future__ import annotations

SHAPES = {
    "wan2.2-ti2v-5b": {},  # the schema's own default is this model's
    "tiny": {"data.image_or_video_shape": (1, 96, 48, 12, 20), "model_num_heads": 4},
}

_ROLLOUT = {
    "model_kwargs.num_frame_per_block": 8,
    "model_kwargs.local_attn_size": 32,
    "model_kwargs.sink_size": 8,
    "inference.multi_shot_sink": True,
    "inference.multi_shot_rope_offset": 8.0,
    "inference.streaming_vae": True,
}

RELEASED = {
    "wan2.2-ti2v-5b": {**_ROLLOUT, "inference.sampling_steps": 4},
    "tiny": {
        **_ROLLOUT,
        "inference.sampling_steps": 8,
        "inference.guidance_scale": 2.5,
        "inference.negative_prompt": "",
        "infra.sharding_strategy": "no_shard",  # it fits many times over, and Muon updates whole matrices
    },
}
