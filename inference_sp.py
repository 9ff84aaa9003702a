"""Generate films, each by several GPUs together: torchrun --nproc_per_node=4 inference_sp.py --config_path configs/inference_sp.yaml (see --help)."""

from longlive.cli.entry import inference_sp
from longlive.cli.scripts import main

if __name__ == "__main__":
    main(inference_sp)
