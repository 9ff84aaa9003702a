"""Decode saved latents into videos."""

from longlive.cli.decode_scripts import decode_vae
from longlive.cli.scripts import main

if __name__ == "__main__":
    main(decode_vae)
