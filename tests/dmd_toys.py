"""A small distillation: `tiny` shrunk to milliseconds, weights in a file, stories of the world as films."""

from pathlib import Path

import torch
from train_toys import DIT, shrink_tiny

from longlive.config import load_config
from longlive.models.wan_dit import WanDiT
from longlive.models.weights import save_state
from longlive.parallel.mesh import Mesh
from longlive.train.distillation import DistillationTask
from longlive.train.trainer import Draw

SHAPE = [1, 48, 48, 2, 4]


def write_generator(folder: Path, name: str = "generator", seed: int = 0) -> Path:
    """Random weights of the shrunk network, safetensors."""
    dit, generator = WanDiT(DIT), torch.Generator().manual_seed(seed)
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.15, generator=generator)
    path = folder / f"{name}.safetensors"
    save_state(path, dict(dit.named_parameters()), {})
    return path


def distillation(folder: Path, **sections) -> dict:
    """Rollouts of one to three chunks in two steps; a LoRA on student and critic."""
    generator = folder / "generator.safetensors"
    tree = {
        "model_kwargs": {"model_name": "tiny"},
        "algorithm": {"trainer": "score_distillation", "teacher_forcing": True, "real_guidance_scale": 1.5},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"image_or_video_shape": SHAPE},
        "checkpoints": {"generator_ckpt": str(generator if generator.exists() else write_generator(folder))},
        "world": {"clips": 4, "min_shots": 1, "max_shots": 3, "wordings": 2},
        "infra": {"gradient_checkpointing": False},
        "inference": {"sampling_steps": 2, "guidance_scale": 1.0, "negative_prompt": "", "local_attn_size": 24},
        "training": {
            "batch_size": 2, "min_num_training_frames": 16, "num_training_frames": 32, "slice_last_frames": 32, "dfake_gen_update_ratio": 2,
            "lr": 1.0e-2, "lr_critic": 1.0e-2, "beta1": 0.5, "beta1_critic": 0.5, "max_iters": 5, "log_iters": 0, "ema_weight": 0.5, "ema_start_step": 1,
            "visibility": "window", "shot_offset": True,
        },
        "logging": {"seed": 3},
    }  # fmt: skip
    merged = {name: (tree.get(name) or {}) | section if isinstance(section, dict) else section for name, section in sections.items()}
    return {name: section for name, section in {**tree, **merged}.items() if section is not None}


def toy_task(folder: Path, mesh: Mesh = Mesh(), **sections) -> DistillationTask:
    shrink_tiny()
    task = DistillationTask(load_config(distillation(folder, **sections)), torch.device("cpu"), mesh)
    task.films.prepare()
    return task


def draw_of(task: DistillationTask, step: int, player: int, stream: int = 0) -> Draw:
    """What the loop would hand to the task, roughly: the same for the same arguments."""
    seed = 1000 * step + 10 * player + stream
    generators = (torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1))
    return Draw(*generators, 0.0, step, 0, task.roles[player].name)


def gradients(task: DistillationTask, player: int, step: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one step of one player; nothing is left on the parameters."""
    loss, _ = task.loss(task.batch(draw_of(task, step, player)))
    loss.backward()
    found = {name: p.grad.clone() for name, p in task.roles[player].trained.named_parameters() if p.grad is not None}
    for network in task.cast.networks:
        network.zero_grad(set_to_none=True)
    return loss.detach(), found
