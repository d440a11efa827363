"""The trained LoRA: adapters, their average, their names in ComfyUI and diffusers."""
