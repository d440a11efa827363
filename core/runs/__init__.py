"""A run over many iterations: on the disk, its trainer, its prompts, its health."""
