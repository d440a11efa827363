"""TreeRPO's method: tree sampling and online RL for flow-matching models.

Everything in this package imports torch, safetensors and the standard library only (`plot.py` also Pillow);
the hosts (ComfyUI, diffusers) are reached through `core/backends`. `docs/method.md` leads from the papers'
equations to the functions here.
"""
