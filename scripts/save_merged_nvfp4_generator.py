"""Save a merged generator for NVFP4 inference."""

from longlive.cli.scripts import main, save_nvfp4

if __name__ == "__main__":
    main(save_nvfp4)
