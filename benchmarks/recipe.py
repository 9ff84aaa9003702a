"""The whole recipe of a small model in one go: VAE, autoregressive model, few-step student, export, film.

    python benchmarks/recipe.py OUT [--toy] [--gpus N]

Every leg is one command of `longlive`, started from the files of the legs before it in OUT, and printed before it runs. Without `--toy` settings are
those of configs/tiny; with it lengths are such that everything ends within minutes on a CPU, and the film shows nothing but that the parts fit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "tiny"
PROMPT = "A small red circle bounces in a meadow. The camera is still."
SMALL = ["data.image_or_video_shape=[1,16,48,2,4]"]
TOY = {
    "vae": [
        *SMALL, "training.max_iters=2", "training.max_seconds=0", "training.compile=false", "world.clips=2", "world.chunks=2", "world.max_shots=2",
        "vae.encoder_base=4", "vae.decoder_base=4", "vae.stages=[{height: 32, width: 64, frames: 9, batch: 1}]",
    ],
    "ar": [
        *SMALL, "training.max_iters=2", "training.max_seconds=0", "training.compile=false", "training.batch_size=2", "world.clips=2", "world.chunks=2",
        "world.max_shots=2", "training.warmup_steps=0",
    ],
    "dmd": [
        *SMALL, "training.max_iters=3", "training.max_seconds=0", "training.compile=false", "training.batch_size=2", "world.clips=2", "world.max_shots=2",
        "algorithm.regression_steps=1", "training.min_num_training_frames=16", "training.num_training_frames=16", "training.slice_last_frames=16",
        "training.ema_start_step=0",
    ],
    "film": ["data.image_or_video_shape=[1,16,48,2,4]", "num_output_frames=16"],
}  # fmt: skip


def weights(folder: Path, stem: str) -> Path:
    """The first file of the weights `stem-0000i-of-0000n.safetensors` in `folder`."""
    return sorted(folder.glob(f"{stem}-00001-of-*.safetensors"))[0]


def legs(out: Path, toy: bool) -> Sequence[tuple[str, Callable[[], list[str]]]]:
    """Name and arguments of `longlive` of every leg, in order; arguments are made when the leg begins, since they name files of the ones before."""
    more = TOY if toy else dict.fromkeys(TOY, [])
    vae = f"checkpoints.vae_ckpt={out / 'vae' / 'vae.safetensors'}"

    def train(leg: str, *words: str) -> list[str]:
        return ["train", str(CONFIGS / f"train_{leg}.yaml"), "--logdir", str(out / leg), "--disable-wandb", *words, *more[leg]]

    def base() -> str:
        return f"checkpoints.generator_ckpt={weights(out / 'ar', 'dit')}"

    def film(*words: str) -> list[str]:
        student = ["inference.sampling_steps=4", "inference.guidance_scale=1.0", f"output_folder={out / 'film'}"]
        return ["generate", PROMPT, base(), vae, *words, *student, *more["film"]]

    return (
        ("vae", lambda: train("vae")),
        ("ar", lambda: train("ar", vae)),
        ("dmd", lambda: train("dmd", base())),
        ("export", lambda: ["export", str(out / "dmd"), str(out / "student.pt"), "--ema"]),
        ("film", lambda: film(f"checkpoints.lora_ckpt={out / 'student.pt'}", "adapter.type=lora")),
    )


def run_recipe(out: Path, toy: bool, run: Callable[[str, list[str]], int]) -> None:
    """Runs every leg; `run(name, arguments)` returns an exit code. Stops the process with the first that is not 0."""
    for name, arguments in legs(out, toy):
        words = arguments()
        print(f"--- {name}: longlive {' '.join(words)}", flush=True)
        if code := run(name, words):
            sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--toy", action="store_true", help="lengths that end within minutes on a CPU")
    parser.add_argument("--gpus", type=int, default=1, help="processes of the legs ar and dmd")
    given = parser.parse_args()
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={given.gpus}"]

    def run(name: str, words: list[str]) -> int:
        launch = several if given.gpus > 1 and name in ("ar", "dmd") else []
        return subprocess.call([sys.executable, *launch, "-m", "longlive", *words])

    run_recipe(given.out, given.toy, run)


if __name__ == "__main__":
    main()
