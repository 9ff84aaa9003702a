"""Decode saved latents into videos with a LightVAE."""

from longlive.cli.decode_scripts import decode_light
from longlive.cli.scripts import main

if __name__ == "__main__":
    main(decode_light)
