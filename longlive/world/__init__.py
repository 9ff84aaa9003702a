"""The procedural video world: stories, captions, a renderer, and a judge that can be exact because the world is known. Imports core and data only."""
