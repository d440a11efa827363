"""TreeRPO's method: tree sampling and online RL for flow-matching models.

Everything outside `hosts/` imports torch, safetensors and the standard library only (pictures also Pillow); ComfyUI and
diffusers are reached through `hosts/`. ARCHITECTURE.md is the map; `docs/method.md` leads from the papers' equations to
the functions here.
"""
