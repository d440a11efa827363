"""run.yaml: all that a training run needs, for the trainer without ComfyUI. Read, checked with one sentence per
mistake, and written with its comments.

    model, adapter, prompts, sampling, shape, noise, objective, settings, rewards, judge, run, processes

A line `preset: NAME` (core.method.published) sets what the file itself does not, as a published trainer has it.
Every section is a dataclass; its fields' comments are the comments in the file. Paths are relative to the file's
folder.
"""

import copy
import dataclasses
import difflib
import importlib
import inspect
import json
import math
import re
import reprlib
from dataclasses import dataclass, field
from pathlib import Path

from ..method.noise import NoiseSchedule
from ..method.objective import Objective
from ..method.published import PRESETS
from ..method.tree import TreeShape
from .prompts import PromptList, PromptText, collect, read, split
from .trainer import DECAYS, Settings

FILL_IN = "fill in"  # what the Trainer node writes where it does not know


@dataclass
class ModelConfig:
    """The base model."""

    source: str = ""  # embedded/flux, embedded/sd3, a .safetensors file of ComfyUI's, or a diffusers pipeline's folder
    name: str = ""  # what the run's files call it; empty = made from the source. A run goes on only under the same name
    conditioning: str = ""  # file with the prompts' text features, from the Trainer node; empty = the source's encoders
    vae: str = ""  # a VAE's file or folder; empty = the source's own
    dtype: str = "float32"  # of the base model: float32 | bfloat16 | float16
    checkpointing: bool = False  # recompute blocks in the backward pass: far less memory, a third slower, exact


@dataclass
class AdapterConfig:
    """The LoRA that is trained; fixed for the whole run."""

    rank: int = 32  # higher = can change more, needs more memory
    alpha: float = 64.0  # its strength is alpha / rank
    targets: str = "attention"  # attention | attention+mlp | all linear | a regular expression over layer names
    dtype: str = "float32"  # float32 | bfloat16
    seed: int = 0  # of its first values


@dataclass
class PromptConfig:
    """What is drawn."""

    train: list = field(default_factory=list)  # one prompt per line
    held_out: list = field(default_factory=list)  # prompts that are never trained on, for evaluation
    file: str = ""  # instead of train: a .txt, .jsonl or .csv file
    hold_out: float = 0.0  # of the file's prompts: a share below 1, or how many
    split_seed: int = 0  # another number holds out others


@dataclass
class SamplingConfig:
    """How it is drawn."""

    width: int = 1024  # pixels, a multiple of 16
    height: int = 1024  # pixels, a multiple of 16
    steps: int = 10  # sampling steps while training
    scheduler: str = "simple"  # simple = ComfyUI's | pipeline = that of the pipeline's folder
    sigmas: list = field(default_factory=list)  # instead of steps and scheduler: the noise levels, falling to 0
    cfg: float = 1.0  # classifier-free guidance; 1 = off, half the cost
    guidance: float = 3.5  # FLUX's own guidance
    negative: str = ""  # negative prompt, where cfg is not 1


@dataclass
class RewardConfig:
    """One reward model."""

    kind: str = ""  # image_reward, hps_v2, hpsv3, pickscore, clipscore, aesthetic, ocr, measure, drawing or server
    path: str = ""  # weights; for measure what is measured; for drawing embedded/critic; for server the address
    weight: float = 1.0  # how much it counts; below 0 = the less, the better
    device: str = ""  # where it runs, such as cuda:1 or cpu; empty = the process's own
    options: dict = field(default_factory=dict)  # as core.rewards.load takes them


@dataclass
class RunConfig:
    """The run on the disk."""

    name: str = "run"  # for messages
    folder: str = "."  # where its files are; a run that is there is continued
    iterations: int = 100  # in all, earlier sessions included
    raw_rewards: bool = False  # several rewards: add them up as they are, not each compared within its group first


@dataclass
class ProcessConfig:
    """Several processes, as accelerate launch starts them."""

    per_prompt: int = 1  # processes that share the trees of one prompt; the others share out the prompts
    timeout: float = 1800.0  # seconds to wait for another process


@dataclass
class Config:
    """A whole run.yaml."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    shape: TreeShape = field(default_factory=lambda: TreeShape(tail=0.4))
    noise: NoiseSchedule = field(default_factory=lambda: NoiseSchedule("cps", 0.7))
    objective: Objective = field(default_factory=Objective)
    settings: Settings = field(default_factory=Settings)
    rewards: list[RewardConfig] = field(default_factory=list)
    judge: list[RewardConfig] = field(default_factory=list)  # rewards that are not trained on
    run: RunConfig = field(default_factory=RunConfig)
    processes: ProcessConfig = field(default_factory=ProcessConfig)
    home: Path = Path()  # the folder of the file

    def path(self, text: str) -> str:
        """A path of the file as one that can be opened; "" and embedded/... stay as they are."""
        return text if not text or text.startswith("embedded/") else str(self.home / Path(text).expanduser())

    def prompt_list(self) -> PromptList:
        prompts = self.prompts
        if prompts.file:
            return split(read(self.path(prompts.file)), prompts.hold_out, prompts.split_seed)
        train, held_out = (
            collect([PromptText("", given)]).train if given else [] for given in (prompts.train, prompts.held_out)
        )
        return PromptList(train, held_out)


SECTIONS = {f.name: f for f in dataclasses.fields(Config) if f.name != "home"}
RECORDED = ("shape", "schedule", "objective")  # fields of Settings that the trainer fills in itself


def load(path: Path | str) -> Config:
    """A run.yaml. ValueError in one sentence for the first mistake in it."""
    path = Path(path)
    try:
        yaml = importlib.import_module("yaml")
    except ImportError as error:
        raise ImportError("Reading run.yaml needs the package PyYAML: pip install pyyaml") from error
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"There is no run file {path} that can be read ({error.strerror}): check its path.") from error
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply: no part of it needs more than three levels.") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a date such as 2026-99-99 is a ValueError
        mark = getattr(error, "problem_mark", None)
        raise ValueError(
            f"{path.name} is not YAML{f', line {mark.line + 1}' if mark else ''} "
            f"({getattr(error, 'problem', None) or error}): check the indentation and quotes there."
        ) from error
    config = parse(found if found is not None else {})
    config.home = path.resolve().parent
    return config


def parse(found: dict) -> Config:
    """What YAML gave, checked."""
    known(found, ["preset", *SECTIONS], "run.yaml")
    defaults = preset(found.get("preset", ""))
    sections = {name: getattr(defaults, name) for name in SECTIONS}
    for name, value in found.items():
        if name == "preset":
            continue
        before = getattr(defaults, name)
        if name in ("rewards", "judge"):
            listed = [] if value is None else value if isinstance(value, list) else [value]
            sections[name] = [
                section(RewardConfig, entry, f"{name}, entry {number}") for number, entry in enumerate(listed, 1)
            ]
        else:
            sections[name] = section(type(before), value, name, before)
    config = Config(**sections)
    refuse_incomplete(config)
    return config


def preset(name: str) -> Config:
    """The defaults of a run.yaml with this preset, one of core.method.published; "" = none."""
    if not name:
        return Config()
    if name not in list(PRESETS):
        raise ValueError(f"preset: there is no '{shown(name)}': choose one of {', '.join(PRESETS)}.")
    found = PRESETS[name]
    return Config(
        sampling=SamplingConfig(**found["sampling"]),
        settings=Settings(**found["settings"]),
        **{part: copy.deepcopy(found[part]) for part in ("shape", "noise", "objective")},
    )


def known(found, keys: list[str], where: str) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{where} must be lines such as '{keys[0]}: ...', not '{shown(found)}'.")
    for key in found:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, 1, 0.5)
            raise ValueError(
                f"{where} has no '{shown(key)}'"
                + (f": did you mean '{near[0]}'?" if near else f": it has {', '.join(keys)}.")
            )


def shown(value) -> str:
    """The beginning of a value, for a sentence; never all of it, for YAML's aliases can make it endless."""
    return (value if isinstance(value, str) else reprlib.repr(value))[:40]


def section(kind, found, where: str, before=None):
    """One dataclass from its part of the file; what is not there stays as in `before`."""
    fields = {f.name: f for f in dataclasses.fields(kind) if not (kind is Settings and f.name in RECORDED)}
    known({} if found is None else found, list(fields), where)
    values = {} if before is None else {f.name: getattr(before, f.name) for f in dataclasses.fields(kind)}
    for name, value in (found or {}).items():
        if value == FILL_IN:
            raise ValueError(f"{where}: {name} still has to be filled in.")
        values[name] = converted(value, fields[name].type, f"{where}: {name}")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def converted(value, kind, where: str):
    """A value of YAML as the field's type; YAML takes numbers such as 1e-4 for text."""
    wanted = {"list": list, "dict": dict}.get(str(getattr(kind, "__origin__", kind).__name__), kind)
    if wanted is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            if math.isfinite(float(value)):
                return float(value)
        except (ValueError, OverflowError):
            pass
    elif wanted is str and isinstance(value, (bool, int, float, type(None))):
        # YAML takes off for false
        return "" if value is None else ("off", "on")[value] if isinstance(value, bool) else str(value)
    elif isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    words = {
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        str: "text",
        list: "a list",
        dict: "lines of 'name: value'",
    }[wanted]
    raise ValueError(f"{where} must be {words}, not '{shown(value)}'.")


def refuse_incomplete(config: Config) -> None:
    prompts, sampling = config.prompts, config.sampling
    if not config.model.source:
        raise ValueError(
            "model: source is missing: write embedded/flux, a .safetensors file, or the folder of a diffusers pipeline."
        )
    if not config.rewards:
        raise ValueError(
            "rewards: there is none: write at least one, such as - {kind: measure, path: foreground size}."
        )
    if bool(prompts.file) == bool(prompts.train):
        raise ValueError("prompts: give either train, a list, or file.")
    for name in ("train", "held_out"):
        if any(not isinstance(text, str) or not text.strip() for text in getattr(prompts, name)):
            raise ValueError(f"prompts: {name} must be a list of texts, one prompt each.")
    if sampling.width % 16 or sampling.height % 16 or min(sampling.width, sampling.height) < 16:
        raise ValueError(f"sampling: the size {sampling.width}x{sampling.height} must be multiples of 16.")
    for where, name, value, options in (
        ("model", "dtype", config.model.dtype, ("float32", "bfloat16", "float16")),
        ("adapter", "dtype", config.adapter.dtype, ("float32", "bfloat16")),
        ("settings", "on_alarm", config.settings.on_alarm, ("pause", "warn", "off")),
        ("settings", "decay", config.settings.decay, DECAYS),
    ):
        if value not in options:
            raise ValueError(f"{where}: {name} is '{value}': choose one of {', '.join(options)}.")
    if config.objective.target == "images" and config.objective.sft:
        raise ValueError(
            "objective: the target 'images' needs the images of the Trainer node: use best-path or best-leaf here."
        )


def dump(config: Config, notes: dict[str, str] | None = None, head: str = "") -> str:
    """run.yaml's text. notes: instead of a field's comment, by 'section.field'."""
    lines = [f"# {line}" for line in head.splitlines()]
    for name in SECTIONS:
        value = getattr(config, name)
        lines += ["", f"{name}:" if not isinstance(value, list) or value else f"{name}: []"]
        entries = value if isinstance(value, list) else [value]
        for number, entry in enumerate(entries):
            about, first = comments(type(entry)), True
            for f in dataclasses.fields(entry):
                if isinstance(entry, Settings) and f.name in RECORDED:
                    continue
                lead = "  " if not isinstance(value, list) else "  - " if first else "    "
                note = (notes or {}).get(
                    f"{name}.{f.name}" if not isinstance(value, list) else f"{name}.{number}.{f.name}",
                    about.get(f.name, ""),
                )
                lines += written(lead + f.name, getattr(entry, f.name), note)
                first = False
    return "\n".join(lines) + "\n"


def written(name: str, value, note: str) -> list[str]:
    """The lines of one field."""
    comment = f"# {note}" if note else ""
    if isinstance(value, list) and value and all(isinstance(entry, str) for entry in value):
        indent = " " * (len(name) - len(name.lstrip(" -")))
        return [f"{name}:  {comment}".rstrip(), *(f"{indent}  - {scalar(entry)}" for entry in value)]
    line = f"{name}: {scalar(value)}"
    return [f"{line:<32}{comment}".rstrip() if len(line) < 32 else f"{line}  {comment}".rstrip()]


def scalar(value) -> str:
    """A value as YAML reads it back exactly. JSON is YAML, apart from numbers such as 1e-05, which need a point."""
    if isinstance(value, float):
        return re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))
    if isinstance(value, list):
        return "[" + ", ".join(map(scalar, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(key)}: {scalar(entry)}" for key, entry in value.items()) + "}"
    if (
        isinstance(value, str)
        and re.fullmatch(r"[A-Za-z][\w +/.-]*[\w)]", value)
        and value.lower() not in ("yes", "no", "on", "off", "true", "false", "null", "none")
    ):
        return value
    return json.dumps(value, ensure_ascii=False)


def comments(kind) -> dict[str, str]:
    """The comment of every field of a dataclass, as its source has it."""
    return dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(kind), re.MULTILINE))
