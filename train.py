"""Train a model: torchrun --nproc_per_node=N train.py --config_path configs/train_ar.yaml --logdir logs/train_ar (see --help)."""

from longlive.cli.entry import train
from longlive.cli.scripts import main

if __name__ == "__main__":
    main(train)
