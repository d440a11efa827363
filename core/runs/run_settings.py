"""The settings of a run: what it is begun with and cannot change, and what of them differs."""

import hashlib
import reprlib


def adapter_settings(
    rank: int, alpha: float, targets: str, dtype: str, seed: int, base_model: str, layers, patches: str = "none"
) -> dict:
    """What a run is begun with and cannot change.

    layers: names of the adapted modules. patches: what else lies on the base model's weights, such as another LoRA.
    """
    adapted = hashlib.blake2b("\n".join(layers).encode(), digest_size=8).hexdigest()
    return {
        "rank": rank,
        "alpha": alpha,
        "targets": targets,
        "dtype": dtype,
        "seed": seed,
        "base_model": base_model,
        "model_patches": patches,
        "adapted": adapted,
    }


def without_trainer(config: dict) -> dict:
    return {key: value for key, value in config.items() if key != "trainer"}


def refuse_other_settings(name: str, saved: dict, wanted: dict) -> None:
    """A run goes on only with the settings it was begun with, the trainer's aside; one sentence names those that
    differ.
    """
    saved = {"model_patches": wanted.get("model_patches"), **saved}  # before 0.1.0 that was not known
    differing = [key for key in without_trainer(wanted) if saved.get(key) != wanted[key]]
    if differing:
        changes = ", ".join(f"{key} {saved.get(key)!r} -> {wanted[key]!r}" for key in differing)
        raise ValueError(
            f"Run '{name}' was begun with other settings ({changes}): set them back or choose another run name."
        )


def changed_settings(saved: dict, wanted: dict) -> list[str]:
    """What differs, for a log or a message: 'learning_rate 0.0003 -> 0.0001'. Long texts are shortened."""
    text = [{key: reprlib.repr(value) for key, value in settings.items()} for settings in (saved, wanted)]
    return [
        f"{key} {text[0].get(key, 'not set')} -> {text[1].get(key, 'not set')}"
        for key in {**saved, **wanted}
        if (key in saved, saved.get(key)) != (key in wanted, wanted.get(key))
    ]
