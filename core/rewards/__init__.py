"""Reward models: `score(images [B, H, W, 3] in 0..1, prompts: list of B strings) -> Tensor [B]`, higher is better."""
