"""TreeRPO without ComfyUI: train from a run.yaml on one process or many, and convert LoRA files.

    python -m standalone.launch train --config run.yaml                 one process
    accelerate launch -m standalone.launch train --config run.yaml      as many as accelerate's own configuration says
    (docs/scaling.md) python -m standalone.launch convert IN OUT --to diffusers|comfyui

A run that is interrupted goes on with the same command, on any number of processes.
"""

import argparse
import logging
import os
import signal
import sys
from pathlib import Path

import torch

from core import rewards
from core.hosts import diffusers_models as hosts
from core.hosts.peft import Attached, new_adapters
from core.lora.networks import NETWORKS
from core.method.ranks import ALONE, OtherProcess, Ranks
from core.rewards.combine import combine
from core.runs.config import Config, load
from core.runs.run import Run
from core.runs.run_settings import adapter_settings
from core.runs.trainer import Event, Trainer
from standalone import processes

log = logging.getLogger("treerpo")
# ComfyUI's class for each network, by which its runs name their base
BASES = {"flux": "Flux", "sd3": "SD3", "flux2": "Flux2", "z-image": "Lumina2", "qwen-image": "QwenImage"}


class Stopped(BaseException):
    """SIGTERM or Ctrl+C."""


class Stop:
    """Notes that the job is to end; the trainer asks between all pieces of work, so that no update is half done."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        if self.signal and number == signal.SIGINT:  # the second Ctrl+C: at once
            raise KeyboardInterrupt
        self.signal = number

    def check(self) -> None:
        if self.signal:
            raise Stopped(f"Stopped by signal {self.signal}")


def prepare(config: Config, ranks: Ranks, device: torch.device, check=None) -> Trainer:
    """Model, adapters, rewards and run of a run.yaml, ready to go on."""
    prompts, settings, sampling = config.prompt_list(), config.settings, config.sampling
    model = hosts.open_model(
        config.path(config.model.source),
        dtype=config.model.dtype,
        conditioning=config.path(config.model.conditioning),
        vae=config.path(config.model.vae),
        device=device,
    )
    adapter = config.adapter
    adapters = new_adapters(
        model.transformer, adapter.rank, adapter.alpha, adapter.targets, hosts.DTYPES[adapter.dtype], adapter.seed
    )
    run = open_run(config, model, adapters, ranks)
    attached = Attached(adapters.to(device), model.transformer)
    if config.model.checkpointing:
        model.transformer.enable_gradient_checkpointing()
    if ranks.lockstep:
        processes.shard(model.transformer, adapters.parameters(), ranks, device)
    else:
        model.transformer.to(device)
    reward, judge = (load_rewards(config, entries, device) for entries in (config.rewards, config.judge))
    drawn = sampling.steps, sampling.scheduler, sampling.height, sampling.width
    sigmas = torch.tensor(sampling.sigmas) if sampling.sigmas else hosts.sampling_sigmas(model, *drawn)
    texts = [*prompts.train, *(prompts.held_out if settings.evaluate_every else [])]
    shape = model.shape(sampling.height, sampling.width)
    host = hosts.DiffusersHost(
        model,
        attached,
        sigmas,
        shape,
        texts,
        negative=sampling.negative,
        cfg=sampling.cfg,
        guidance=sampling.guidance,
        start=getattr(model.encode, "start", None),
    )
    return Trainer(
        run,
        host,
        prompts,
        config.shape,
        config.noise,
        config.objective,
        reward,
        settings,
        judge=judge,
        check=check,
        ranks=ranks,
    )


def open_run(config: Config, model, adapters, ranks: Ranks) -> Run:
    """The run in the folder, or a new one; the first process reads it, the others get it from there. Its settings are
    recorded as the Policy node does.
    """
    adapter = config.adapter
    base = config.model.name or " ".join((BASES[model.network], Path(config.model.source).name))
    if config.model.source in hosts.EMBEDDED and not config.model.name:
        base += ".safetensors"
    recorded = adapter_settings(
        adapter.rank, adapter.alpha, adapter.targets, adapter.dtype, adapter.seed, base, adapters.names
    )
    folder = Path(config.path(config.run.folder))
    run = Run.open(folder, adapters, recorded) if ranks.rank == 0 else Run(folder, adapters, recorded)
    run.share(ranks)
    return run


def load_rewards(config: Config, entries: list, device: torch.device):
    """The rewards of a section as one; None where there are none."""
    models = []
    for number, entry in enumerate(entries, 1):
        path = entry.path if entry.kind in ("measure", "server") else config.path(entry.path)
        options = {
            name: config.path(value) if name in ("clip", "tokenizer") and isinstance(value, str) else value
            for name, value in entry.options.items()
        }
        try:
            models.append(rewards.load(entry.kind, path, entry.device or device, **options))
        except TypeError as error:  # an option that this kind does not have
            raise ValueError(f"Reward {number} ({entry.kind}) cannot be loaded with these options: {error}.") from error
    if len(models) == 1 and entries[0].weight == 1:
        return models[0]
    return combine(models, [entry.weight for entry in entries], config.run.raw_rewards) if models else None


def line(run: Run, iterations: int):
    """What is logged after every iteration."""

    def report(event: Event) -> None:
        row = event.row
        reward = f"reward {row['reward']:.4f} ± {row['reward_std']:.4f}"
        text = (
            f"iteration {run.iteration}/{iterations}   {reward}   {row['forwards']} forwards   {row['seconds']:.1f} s"
        )
        log.info("\n".join(filter(None, (text, event.note, event.message))))

    return report


def command_train(args) -> int:
    stop = Stop()
    ranks, first = ALONE, int(os.environ.get("RANK", 0)) == 0
    logging.getLogger("treerpo").setLevel(logging.INFO if first else logging.WARNING)
    try:
        config = load(args.config)
        if args.folder:
            config.run.folder = str(Path(args.folder).absolute())
        if args.iterations:
            config.run.iterations = args.iterations
        ranks, device = processes.connect(config.processes.per_prompt, config.processes.timeout)
        trainer = prepare(config, ranks, device, stop.check)
        log.info(
            "%s on %d process(es), %d prompts, from iteration %d: %s",
            config.run.name,
            ranks.size,
            len(trainer.prompts.train),
            trainer.run.iteration,
            trainer.run.folder,
        )
        status = trainer.train(config.run.iterations, line(trainer.run, config.run.iterations))
        log.info("; ".join([status, *(f"changed: {change}" for change in trainer.changes)]))
        return 0
    except (Stopped, KeyboardInterrupt) as error:
        log.warning("%s; the same command goes on from the last saved state.", str(error) or "Stopped")
        return 128 + (stop.signal or signal.SIGINT)
    except OtherProcess as error:
        log.info("%s", error)
        return 1
    except Exception as error:
        log.error(
            "Process %d: %s", ranks.rank, error, exc_info=not isinstance(error, (ValueError, ImportError, OSError))
        )
        return 1
    finally:
        processes.disconnect()


def command_convert(args) -> int:
    from core.lora.interchange import convert

    try:
        log.warning("%s", convert(args.source, args.target, args.to, args.network))
    except (ValueError, OSError) as error:
        log.error("%s", error)
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m standalone.launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train from a run.yaml")
    training.add_argument(
        "--config", required=True, type=Path, help="the run.yaml; the Trainer node writes one into its run's folder"
    )
    training.add_argument("--folder", help="another folder for the run than the file names")
    training.add_argument("--iterations", type=int, help="another number of iterations in all")
    converting = commands.add_parser("convert", help="a LoRA file in another form")
    converting.add_argument("source", type=Path)
    converting.add_argument("target", type=Path)
    converting.add_argument("--to", required=True, choices=("diffusers", "comfyui"))
    converting.add_argument(
        "--network",
        choices=tuple(NETWORKS),
        help="for a file of an unpublished size whose layers several networks have",
    )
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
    return {"train": command_train, "convert": command_convert}[args.command](args)


if __name__ == "__main__":
    sys.exit(main())
