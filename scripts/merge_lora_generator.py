"""Merge a base generator and a LoRA into one checkpoint."""

from longlive.cli.scripts import main, merge_lora

if __name__ == "__main__":
    main(merge_lora)
