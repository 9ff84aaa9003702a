"""Generate films from prompts: python inference.py --config_path configs/inference.yaml (see --help). Under torchrun, ranks share the prompts."""

from longlive.cli.entry import inference
from longlive.cli.scripts import main

if __name__ == "__main__":
    main(inference)
