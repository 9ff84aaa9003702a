"""Show which frames each rank encodes in sequence-parallel training."""

from longlive.cli.scripts import main, halo_windows

if __name__ == "__main__":
    main(halo_windows)
