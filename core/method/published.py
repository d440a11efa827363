"""What published trainers do, as settings of this one: presets of run.yaml (`preset: treegrpo_code`), and baselines."""

from .noise import NoiseSchedule
from .objective import Objective
from .tree import TreeShape

_CLIP = {"clip_low": 1e-4, "clip_high": 1e-4}  # at 512x512
_TREEGRPO = {
    "noise": NoiseSchedule("flow_sde", 0.7),
    "objective": Objective(**_CLIP),
    "sampling": {"width": 512, "height": 512, "steps": 10, "cfg": 4.5},
}
PRESETS = {  # by name: shape, noise, objective, and fields of Settings and SamplingConfig
    # TreeGRPO as its paper has it (arXiv 2512.08153): b = 3, w = 3, a random window with r = 0.5, credit by probability
    "treegrpo_paper": {
        **_TREEGRPO,
        "shape": TreeShape(branching=3, depth=3, window="random", ratio=0.5),
        "settings": {"learning_rate": 1e-5, "weight_decay": 0.01, "estimator": "treegrpo", "weights": "mean-logprob"},
    },
    # ... and as its public code has it (MAIR-Lab-HUST/TMPO 3d8f6180, TreeGRPO-main): b = 2, w = 4, a window that slides
    # by a step every 50 epochs, the plain mean of the children, two optimizer steps per epoch. Those take a random half
    # of the tree's nodes each, these all of them. It trains all weights, so a LoRA needs a higher rate.
    "treegrpo_code": {
        **_TREEGRPO,
        "shape": TreeShape(branching=2, depth=4, window="sliding", stride=1, interval=50),
        "settings": {
            "learning_rate": 1e-5,
            "weight_decay": 1e-4,
            "estimator": "treegrpo",
            "weights": "uniform",
            "inner_updates": 2,
        },
    },
}
