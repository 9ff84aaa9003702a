"""The distillation task: who shares which network, what is drawn alike, what is written, and that a stopped run goes on as if it had not."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from dmd_toys import SHAPE, distillation, draw_of, gradients, toy_task, write_generator
from train_toys import shrink_tiny

from longlive.bench import distil
from longlive.config import load_config
from longlive.config.show import config_table
from longlive.core.errors import CheckpointError, ConfigError
from longlive.engine.adapters import configured_adapters
from longlive.models import spec
from longlive.models.lora_files import read_lora
from longlive.models.weights import MERGED_FORMAT, read_state, save_state
from longlive.parallel.data_parallel import Replicas
from longlive.parallel.mesh import Mesh
from longlive.train import RunOptions, checkpoint, rehearse, run, trainer
from longlive.train import distillation as module
from longlive.train.cast import Merged
from longlive.train.launch import loop_settings
from longlive.train.lora_export import export_lora, trained_lora
from longlive.train.optim import guarded_step
from longlive.train.players import Player
from longlive.train.state import parts


@pytest.fixture(autouse=True)
def small_tiny(monkeypatch):
    monkeypatch.setitem(spec.MODELS, "tiny", spec.TINY)
    shrink_tiny()


def storage(dit):
    return {name: p.data_ptr() for name, p in dit.named_parameters() if ".lora." not in name}


def test_roles_that_start_alike_share_one_network(tmp_path):
    task = toy_task(tmp_path)
    assert len(task.cast.networks) == 1 and [role.name for role in task.roles] == ["generator_lora", "critic_lora"]
    assert not any(p.requires_grad for name, p in task.module.named_parameters() if ".lora." not in name)
    own = toy_task(tmp_path, adapter={"apply_to_critic": False})
    assert len(own.cast.networks) == 2 and own.cast.student.dit is own.cast.teacher.dit
    assert [role.name for role in own.roles] == ["generator_lora", "critic"]
    whole = toy_task(tmp_path, adapter=None)
    assert len(whole.cast.networks) == 3 and len({ptr for n in whole.cast.networks for ptr in storage(n).values()}) == 3 * len(storage(whole.module))


def test_the_critic_starts_from_its_own_checkpoint(tmp_path):
    """D6: also where everything is a LoRA."""
    other = write_generator(tmp_path, "critic", seed=7)
    wanted = read_state(other).tensors["head.head.weight"]
    for adapter in ({}, {"apply_to_critic": False}, None):
        task = toy_task(tmp_path, adapter=adapter, checkpoints={"fake_score_ckpt": str(other)})
        assert torch.equal(task.cast.critic.dit.head.head.weight, wanted)
        assert not torch.equal(task.cast.teacher.dit.head.head.weight, wanted)


def test_a_lora_starts_equal_on_every_rank(tmp_path):
    """D7: whatever the process-wide generator holds."""
    started = []
    for rank in range(2):
        torch.manual_seed(100 + rank)
        task = toy_task(tmp_path, Mesh(dp_rank=rank, dp_size=2))
        started.append({name: p.detach().clone() for name, p in task.roles[0].trained.named_parameters()})
    assert all(torch.equal(started[0][name], started[1][name]) for name in started[0])
    assert any(p.abs().max() > 0 for p in started[0].values())


def test_only_the_player_whose_turn_it_is_gets_gradients(tmp_path):
    for adapter in ({}, {"apply_to_critic": False}, None):
        task = toy_task(tmp_path, adapter=adapter)
        for player, role in enumerate(task.roles):
            loss, _ = task.loss(task.batch(draw_of(task, 0, player)))
            loss.backward()
            learned = {id(p) for network in task.cast.networks for p in network.parameters() if p.grad is not None}
            assert learned <= {id(p) for p in role.trained.parameters()} and len(learned) > 10
            for network in task.cast.networks:
                network.zero_grad(set_to_none=True)


def test_recomputed_activations_know_who_spoke(tmp_path):
    """A student's blocks are recomputed after teacher and critic have spoken on the same network."""
    kept, recomputed = toy_task(tmp_path), toy_task(tmp_path, infra={"gradient_checkpointing": True})
    for task in (kept, recomputed):
        for branch in task.cast.student.all_branches:
            torch.nn.init.normal_(branch.b, std=0.1, generator=torch.Generator().manual_seed(1))
    for player in range(2):
        (loss, ours), (other, theirs) = (gradients(task, player) for task in (kept, recomputed))
        assert loss == other and ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-7)


def test_all_ranks_leave_at_the_same_step(tmp_path):
    ranks = [toy_task(tmp_path, Mesh(dp_rank=rank, dp_size=2)) for rank in range(2)]
    drawn = [[task.batch(draw_of(task, step, player, stream)) for step in range(12) for player in range(2)] for stream, task in enumerate(ranks)]
    assert [(s.chunks, s.exits) for s in drawn[0]] == [(s.chunks, s.exits) for s in drawn[1]]
    assert {s.chunks for s in drawn[0]} == {2, 3, 4} and {s.exits.steps[0] for s in drawn[0]} == {0, 1}
    assert all(len(set(s.exits.steps)) == 1 for s in drawn[0])
    assert [s.films.cuts for s in drawn[0]] != [s.films.cuts for s in drawn[1]]
    apart = toy_task(tmp_path, algorithm={"same_step_across_blocks": False})
    assert any(len(set(apart.batch(draw_of(apart, step, 0)).exits.steps)) > 1 for step in range(8))
    last = toy_task(tmp_path, algorithm={"last_step_only": True}).batch(draw_of(ranks[0], 0, 0)).exits.steps
    assert set(last) == {1}


def test_what_ranks_draw_alike_is_of_no_rank():
    """No stream of the loop has the seed of what all ranks share."""
    shared = {trainer.seed_of(3, module.SHARED, step, 0, player) for step in range(4) for player in range(2)}
    own = {trainer.seed_of(3, stream, step, 0, number) for stream in range(64) for step in range(4) for number in range(4)}
    assert not shared & own


def test_the_negative_prompt_is_encoded_once(tmp_path, monkeypatch):
    task, asked = toy_task(tmp_path), []
    rows = task.films.text.rows
    monkeypatch.setattr(task.films.text, "rows", lambda prompts: asked.append(prompts) or rows(prompts))
    for step in range(3):
        gradients(task, 0, step)
    assert asked == [[""]]


def test_what_a_run_cannot_follow_is_said(tmp_path, caplog):
    toy_task(tmp_path, training={"ema_weight": 0.0}, algorithm={"ts_schedule": True, "last_step_only": True, "same_step_across_blocks": False})
    assert "is ignored" not in caplog.text
    toy_task(
        tmp_path,
        training={"compile": True, "max_grad_norm": 1.0},
        infra={"rollout_copy": True, "generator_quant": True},
        algorithm={"ts_schedule": True, "ts_schedule_max": True, "same_step_across_blocks": False},
        merge_lora=True,
    )
    for key in ("infra.rollout_copy", "training.compile", "training.max_grad_norm", "merge_lora", "algorithm.ts_schedule", "algorithm.ts_schedule_max"):
        assert f"{key} is ignored" in caplog.text
    assert caplog.text.count("is ignored") == 6


def test_what_has_no_effect_off_policy_is_said(tmp_path, caplog):
    """There are no rollouts, so that no copy of the student is made for them."""
    every = {
        "algorithm": {"ts_schedule": True, "ts_schedule_max": True, "last_step_only": True, "same_step_across_blocks": False, "context_noise": 5.0},
        "training": {"finish_chunks": True},
        "infra": {"rollout_copy": True},
    }

    def task(**sections):
        sections["algorithm"] = {"backward_simulation": False} | sections.get("algorithm", {})
        config = load_config(distillation(tmp_path, data={"data_path": str(tmp_path), "image_or_video_shape": SHAPE}, **sections))
        return module.DistillationTask(config, torch.device("cpu"), Mesh(), films=films)

    films = toy_task(tmp_path).films
    task()
    assert "is ignored" not in caplog.text
    assert task(**every).stepper is None
    said = [f"{section}.{key} is ignored: off-policy there are no rollouts" for section, keys in every.items() for key in keys]
    assert all(text in caplog.text for text in said) and caplog.text.count("is ignored") == len(said)


def test_steps_without_the_student_are_reported_without_its_loss(tmp_path, caplog):
    caplog.set_level("INFO", logger="longlive")
    task = toy_task(tmp_path)
    loop = trainer.Loop(task, loop_settings(task.config, False), tmp_path / "logs", config=config_table(task.config), replicas=Replicas(), stream=0)
    for said in ("step 1  loss ", "step 2  lr "):
        loop._step()
        loop._report()
        assert said in caplog.text and caplog.text.count("critic_loss") == loop.state.step


def test_gradients_of_the_last_frames_only(tmp_path):
    task = toy_task(tmp_path, training={"slice_last_frames": 8, "min_num_training_frames": 32})
    step = task.batch(draw_of(task, 0, 0))
    assert step.chunks == 4 and step.exits.first_with_gradients == 3
    noised = task._noised(step, *[torch.zeros(2, 32, 48, 2, 4)] * 2)
    assert noised.mask_BF.sum(1).tolist() == [8.0, 8.0] and noised.mask_BF[:, :24].abs().max() == 0
    assert gradients(task, 0)[1]


def test_score_levels_follow_the_exit(tmp_path):
    task = toy_task(tmp_path, algorithm={"ts_schedule": True, "ts_schedule_max": True})
    for number in range(6):
        step = task.batch(draw_of(task, number, 0))
        high, low = step.exits.bounds(task.schedule, 5.0)
        sigma = task._noised(step, *[torch.zeros(2, step.chunks * 8, 48, 2, 4)] * 2).sigma_BF
        least, most = (max(0.02, min(0.98, 5 * t / 1000 / (1 + 4 * t / 1000))) for t in (low, high))
        assert sigma.min() >= least and sigma.max() <= most + 1e-9


def test_films_of_the_data_are_scored_at_all_levels(tmp_path):
    """They leave at no step, whatever `ts_schedule` says: the exit that was drawn is of a rollout that does not happen."""
    task = toy_task(tmp_path, algorithm={"ts_schedule": True, "ts_schedule_max": True})
    step, film = task.batch(draw_of(task, 0, 0)), torch.zeros(64, 16, 48, 2, 4)
    step = replace(step, films=replace(step.films, cuts=((False, False),) * 64), exits=replace(step.exits, steps=(0, 0)))
    task.config = task.config.with_overrides(["algorithm.backward_simulation=false", f"data.data_path={tmp_path}"])
    sigma = task._noised(step, film, film).sigma_BF
    assert sigma.min() < 0.7 and sigma.max() > 0.95


def test_the_critic_learns_on_the_rollout_of_the_student(tmp_path, monkeypatch):
    """That of the same micro-step, for which no films are drawn."""
    task = toy_task(tmp_path, training={"critic_reuses_rollout": True})
    made, roll, drawn, told = [], module.DistillationTask._rolled, [], task.films.draw
    monkeypatch.setattr(module.DistillationTask, "_rolled", lambda self, step: made.append(step.draw.player) or roll(self, step))
    monkeypatch.setattr(task.films, "draw", lambda draw, chunks: drawn.append(draw.player) or told(draw, chunks))
    draws = [[replace(draw_of(task, 0, player, stream=micro), micro=micro) for micro in range(2)] for player in range(2)]
    batches = [task.batch(draw) for draw in draws[0]]
    for batch in batches:
        task.loss(batch)
    for batch, draw in zip(batches, draws[1]):
        again = task.batch(draw)
        assert again.films is batch.films and again.exits == batch.exits and again.draw is draw
        task.loss(again)
    gradients(task, 1, step=1)
    assert made == drawn == ["generator_lora", "generator_lora", "critic_lora"] and not task._kept


def test_the_critic_is_told_the_velocity_itself(tmp_path, monkeypatch):
    """D8: what is compared with noise - x is the velocity, not one that was made of a rounded x0."""
    task, told = toy_task(tmp_path), {}

    def answer(dit, text, film, mask, noisy, sigma, clean, **how):
        told["v"] = torch.full_like(noisy, 0.5).bfloat16()
        return told["v"].requires_grad_(True)

    monkeypatch.setattr(module, "score", answer)
    noised = module.DistillationTask._noised
    monkeypatch.setattr(module.DistillationTask, "_noised", lambda self, step, *films: told.setdefault("n", noised(self, step, *films)))
    loss, _ = task.loss(task.batch(draw_of(task, 0, 1)))
    assert loss == (0.5 - (told["n"].noise_BFCHW - told["n"].x_BFCHW)).square().mean((2, 3, 4)).mean()


def test_off_policy_steps(tmp_path, monkeypatch):
    """D23: every chunk of the data is noised to a level above 0."""
    task, seen = toy_task(tmp_path), []
    step = task.batch(draw_of(task, 0, 0))
    step = replace(step, films=replace(step.films, latents_BFCHW=torch.randn(2, step.chunks * 8, 48, 2, 4)))
    noising = module.add_noise
    monkeypatch.setattr(module, "add_noise", lambda clean, noise, sigma: seen.append(sigma) or noising(clean, noise, sigma))
    x = task._off_policy(step, task.cast.student.speak(), torch.randn_like(step.films.latents_BFCHW))
    assert x.requires_grad and x.shape == step.films.latents_BFCHW.shape and seen[0].min() > 0.5


RUNS = {
    "LoRA": {},
    "rollout copy": {"infra": {"rollout_copy": True}, "training": {"critic_reuses_rollout": True, "gradient_accumulation_steps": 2}},
    "critic of its own": {"adapter": {"rank": 2, "apply_to_critic": False}},
    "all weights": {"adapter": None},
    "regression": {
        "algorithm": {"regression_steps": 4, "teacher_forcing": True},
        "infra": {"gradient_checkpointing": True},
        "training": {"critic_reuses_rollout": True, "visibility": "window", "shot_offset": True},
    },
    "streaming": {"training": {"streaming_frames": 56, "num_training_frames": 24, "slice_last_frames": 24}},
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_stopped_run_goes_on_exactly(tmp_path, kind):
    """D14: with the moments of both optimizers, also of LoRAs; D12: a critic without LoRA is saved, and its LoRA is not asked for."""

    def train(folder, **training):
        sections = {**RUNS[kind], "training": RUNS[kind].get("training", {}) | {"max_iters": 5} | training}
        config = load_config(distillation(tmp_path, **sections))
        run(config, tmp_path / folder, RunOptions())
        return [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]

    whole = train("whole", log_iters=3)
    assert [("loss" in row, "critic_loss" in row) for row in whole] == [(True, True), (False, True), (True, True), (False, True), (True, True)]
    (tmp_path / "half").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint_model_000003", tmp_path / "half" / "checkpoint_model_000003")
    half = train("half", log_iters=3)
    drop = ("seconds", "ms")
    assert [{k: v for k, v in row.items() if k not in drop} for row in half] == [{k: v for k, v in row.items() if k not in drop} for row in whole][3:]
    ends = [checkpoint.sizes_in(tmp_path / folder / "checkpoint_model_000005") for folder in ("whole", "half")]
    assert ends[0] == ends[1]
    entries = {name.split(".")[0] for name in ends[0]} - {"rank"}
    student = "generator" if kind == "all weights" else "generator_lora"
    critic = "critic" if kind in ("critic of its own", "all weights") else "critic_lora"
    assert entries == {student, f"{student}_ema", f"{student}_optimizer", critic, f"{critic}_optimizer"}
    states = [checkpoint.read_sharded(tmp_path / folder / "checkpoint_model_000005", ends[0]) for folder in ("whole", "half")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_what_is_written_is_read_as_a_lora(tmp_path):
    task = toy_task(tmp_path)
    for branch in task.cast.student.all_branches:
        torch.nn.init.normal_(branch.b, std=0.1)
    for _ in range(2):  # over what is there
        task.export(tmp_path / "out", 7, {})
    folder, file = read_lora(tmp_path / "out" / "lora"), read_lora(tmp_path / "out" / "lora.pt")
    critic = read_lora(tmp_path / "out" / "lora.pt", entry="critic_lora")
    own = dict(task.roles[0].trained.named_parameters())
    for adapter in (folder, file):
        assert adapter.rank == 4 and adapter.alpha == 8 and len(adapter.layers) == len(own) // 2
        for name, layer in adapter.layers.items():
            assert torch.equal(layer.b_OR, own[f"base_model.model.{name}.lora_B.weight"].bfloat16())
    assert file.metadata["step"] == 7 and not torch.equal(critic.layers[name].b_OR, layer.b_OR)
    alone = toy_task(tmp_path, adapter={"apply_to_critic": False})
    alone.export(tmp_path / "alone", 1, {})
    content = torch.load(tmp_path / "alone" / "lora.pt", weights_only=True)
    assert "generator_lora" in content and "critic_lora" not in content  # D12


def test_the_lora_of_a_checkpoint_is_exported_and_generates(tmp_path):
    """From LOGDIR to files in two layouts; a checkpoint itself is read as a LoRA too."""
    config = load_config(distillation(tmp_path, training={"max_iters": 2, "log_iters": 2, "dfake_gen_update_ratio": 1}))
    run(config, tmp_path / "run", RunOptions())
    place = tmp_path / "run" / "checkpoint_model_000002"
    assert all(map(trained_lora, (tmp_path / "run", place, tmp_path / "run" / "lora.pt", tmp_path / "run" / "lora")))
    assert not trained_lora(tmp_path / "generator.safetensors")
    about = export_lora(tmp_path / "run", tmp_path / "student.pt", use_ema=True, layout="published", dtype=torch.float32)
    assert about["weights"] == "ema" and about["step"] == "2" and about["rank"] == "4"
    export_lora(place, tmp_path / "student.safetensors", use_ema=False, layout="comfyui", dtype=torch.float32)
    average, raw, own = read_lora(tmp_path / "student.pt"), read_lora(tmp_path / "student.safetensors"), read_lora(place)
    assert average.alpha == raw.alpha == own.alpha == 8
    said = export_lora(tmp_path / "run" / "lora.pt", tmp_path / "narrow.safetensors", use_ema=False, layout="kohya", dtype=torch.float32, rank=2)
    assert (said["rank"], said["weights"]) == ("2", "ema")
    for layout, name in (("comfyui", "again.safetensors"), ("peft", "again"), ("published", "again.pt")):
        export_lora(tmp_path / "narrow.safetensors", tmp_path / name, use_ema=False, layout=layout, dtype=torch.float32)
        assert trained_lora(tmp_path / name)
    stated = {"trainer": "score_distillation", "step": 2, "steps": config.inference.sampling_steps, "seed": config.logging.seed}
    for name, weights in (("narrow.safetensors", "ema"), ("again", "ema"), ("again.pt", "ema"), ("student.pt", "ema"), ("student.safetensors", "raw")):
        found = read_lora(tmp_path / name)
        assert {key: str(found.metadata[key]) for key in stated} == {key: str(value) for key, value in stated.items()}, name
        assert found.metadata["weights"] == weights and found.rank == (4 if name.startswith("student") else 2), name
    name = "blocks.0.self_attn.q"
    assert torch.equal(raw.layers[name].b_OR, own.layers[name].b_OR) and not torch.equal(average.layers[name].b_OR, raw.layers[name].b_OR)
    generate = load_config({**distillation(tmp_path), "algorithm": {}, "checkpoints": {**distillation(tmp_path)["checkpoints"], "lora_ckpt": str(place)}})
    assert configured_adapters(generate)[0][0].rank == 4
    with pytest.raises(CheckpointError, match="holds only a LoRA"):
        read_state(place, kind="generator")


def test_a_student_starts_from_a_lora(tmp_path):
    """The next leg of a run: both LoRAs of a container; another rank is refused."""
    first = toy_task(tmp_path)
    for branch in first.cast.student.all_branches:
        torch.nn.init.normal_(branch.b, std=0.1)
    first.export(tmp_path / "first", 1, {})
    place = str(tmp_path / "first" / "lora.pt")
    second = toy_task(tmp_path, checkpoints={"lora_ckpt": place}, adapter={"rank": None, "alpha": None})
    for ours, theirs in zip(second.roles, first.roles):
        for (name, p), (_, q) in zip(ours.trained.named_parameters(), theirs.trained.named_parameters()):
            assert torch.equal(p, q.bfloat16().float()), name
    assert second.cast.student.all_branches[0].alpha == 8
    folder = toy_task(tmp_path, checkpoints={"lora_ckpt": str(tmp_path / "first" / "lora")}, adapter={"rank": None, "alpha": None})
    for (name, p), (_, q) in zip(folder.roles[0].trained.named_parameters(), second.roles[0].trained.named_parameters()):
        assert torch.equal(p, q), name  # PEFT's folder has the student's alone
    assert not any(branch.b.any() for branch in folder.cast.critic.all_branches if branch.adapter == "critic")
    with pytest.raises(ConfigError, match=r"adapter.rank\(3\) but .* has rank 4"):
        toy_task(tmp_path, checkpoints={"lora_ckpt": place}, adapter={"rank": 3})


def test_a_dry_run_takes_a_step_of_both_and_writes_nothing(tmp_path):
    report = rehearse(load_config(distillation(tmp_path)))
    assert {"loss", "critic_loss"} <= report.row.keys()
    assert report.memory.peak > 0 and any("stories of the procedural world" in line for line in report.lines())
    assert not list(tmp_path.glob("**/checkpoint*"))


def test_prompts_as_films(tmp_path):
    """A text file and a caption folder; each epoch shows each film once, and goes on where it stopped."""
    (tmp_path / "prompts.txt").write_text("A red circle.\nA blue square.\nA green star.\n")
    task = toy_task(tmp_path, data={"data_path": str(tmp_path / "prompts.txt"), "image_or_video_shape": SHAPE}, training={"batch_size": 1})
    plans = task.films.plans
    assert len(plans) == 3 and [chunk.prompt for chunk in plans[0]] == ["A red circle."] * 4
    shown = [task.films._shuffled(n) for n in range(6)]
    assert sorted(shown[:3]) == sorted(shown[3:]) == [0, 1, 2]
    gradients(task, 0)
    state = task.state()
    again = toy_task(tmp_path, data={"data_path": str(tmp_path / "prompts.txt"), "image_or_video_shape": SHAPE}, training={"batch_size": 1})
    again.restore(state)
    ours, theirs = (t.films.draw(draw_of(t, 1, 0), 2).words.raw_RMt for t in (task, again))
    assert torch.equal(ours, theirs)


def test_a_benchmark_of_both_players(tmp_path, monkeypatch):
    """The trainer's own steps, without checkpoints or data: none of the paths exists."""
    monkeypatch.setattr(distil, "model_spec", lambda name: spec.MODELS["tiny"])
    tree = distillation(tmp_path, checkpoints={"generator_ckpt": "nowhere.pt"}, data={"data_path": "nowhere.txt", "image_or_video_shape": SHAPE})
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    said, took = [], iter([9.0, 3.0, 1.0] * 2)  # the warm-up does not count
    monkeypatch.setattr(distil, "timed", lambda step, device: (next(took), step()))
    rows = distil.bench_distil(distil.DistilSettings(config=tmp_path / "config.yaml", steps=2), tmp_path / "record.json", said.append)
    assert [row["player"] for row in rows] == ["generator_lora", "critic_lora"] and [(row["seconds"], row["least"]) for row in rows] == [(2.0, 1.0)] * 2
    assert [case["status"] for case in json.loads((tmp_path / "record.json").read_text())] == ["done", "done"] and len(said) == 3


def test_noise_on_what_is_committed(tmp_path):
    """`algorithm.context_noise`, a timestep: told to the network, and absent by default."""
    plain, noisy = toy_task(tmp_path), toy_task(tmp_path, algorithm={"context_noise": 100.0})
    assert plain._commit_noise(torch.Generator()) == {} and noisy._commit_noise(torch.Generator())["commit_level"] == 0.1
    with torch.no_grad():
        ours, theirs = (task._rolled(task.batch(draw_of(task, 0, 0))).x_BFCHW for task in (plain, noisy))
    assert torch.equal(ours[:, :8], theirs[:, :8]) and not torch.equal(ours[:, 8:], theirs[:, 8:])


def test_a_merged_generator_takes_no_further_lora(tmp_path):
    """All of its weights may be distilled; what comes of them says what is in it."""
    tensors = read_state(write_generator(tmp_path)).tensors
    merged = tmp_path / "merged.safetensors"
    save_state(merged, tensors, {"checkpoint_format": MERGED_FORMAT, "merged_lora": "true", "lora_ckpt": "style.pt"})
    checkpoints = {"generator_ckpt": str(merged)}
    with pytest.raises(ConfigError, match="already has a LoRA merged into it"):
        toy_task(tmp_path, checkpoints=checkpoints)
    task = toy_task(tmp_path, checkpoints=checkpoints, adapter=None)
    task.export(tmp_path / "out", 1, {})
    assert task.origin and read_state(next((tmp_path / "out").glob("dit-*"))).metadata["checkpoint_format"] == MERGED_FORMAT


@pytest.mark.parametrize("adapter", [{}, None], ids=["LoRA", "all weights"])
def test_the_copy_that_makes_rollouts_follows_the_optimizer(tmp_path, adapter):
    """Fused AdamW writes weights without a sign on them: the copy must notice all the same."""
    task = toy_task(tmp_path, adapter=adapter, infra={"rollout_copy": True}, training={"ema_weight": 0.0})
    player = Player(task.roles[0])
    for step in range(2):
        began = {name: p.clone() for name, p in task.stepper.current().named_parameters()}
        loss, _ = task.loss(task.batch(draw_of(task, step, 0)))
        loss.backward()
        guarded_step(parts(player.optimizer), torch.zeros(()))
        player.optimizer.zero_grad()
        now = dict(task.stepper.current().named_parameters())
        wanted = Merged(task.module, "generator", task.roles[0].trained.state_dict()) if adapter is not None else dict(task.module.named_parameters())
        assert any(not torch.equal(now[name], p) for name, p in began.items())
        for name, p in now.items():
            torch.testing.assert_close(p, wanted[name], rtol=1e-6, atol=1e-7)


def test_history_of_finished_chunks(tmp_path, monkeypatch):
    """`training.finish_chunks`: scores read the films that generation would make, and judge what left at the exit step."""
    task, shown = toy_task(tmp_path, training={"finish_chunks": True}, algorithm={"same_step_across_blocks": True}), []
    scoring = module.score
    monkeypatch.setattr(module, "score", lambda *given, **how: shown.append(given[6]) or scoring(*given, **how))
    step = next(s for s in (task.batch(draw_of(task, n, 0)) for n in range(9)) if s.exits.steps[0] == 0)
    rolled = task._rolled(step)
    assert (rolled.x_BFCHW - rolled.read_BFCHW).abs().max() > 1e-3
    loss, _ = task.loss(step)
    loss.backward()
    assert len(shown) == 2 and shown[0].shape[1] == 8 * step.chunks and all(not clean.requires_grad for clean in shown)
