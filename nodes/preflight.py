"""Looking ahead: what a training run will need of the GPU's memory, and how it fits a smaller card."""

from bisect import bisect_right
from dataclasses import dataclass, replace

import comfy.model_management
from comfy_api.latest import io

from ..core.hosts.comfy_host import start_latent
from ..core.method.tree import TreeShape as Shape
from ..core.model import DECODED_AT_ONCE
from .reward_models import ACTIVATIONS, MOST_ACTIVATIONS
from .schema import PolicySocket, RewardSocket, ShapeSocket, expert, micro_batch_input, schema

GB = 1e9
GIB = 2**30  # what a card of "8 GB" has eight of
THIS = "this GPU"
CARDS = {f"{size} GB": size * GIB for size in (8, 12, 16, 24)}
KEPT_FREE = 1.2 * GIB  # of a card: CUDA's own, the screen's, and what ComfyUI leaves free
EIGHT_BIT = 10 / 16  # of weights, gradients and two moments in float32, when the moments have 8 bits
Q4 = 4.5 / 8  # bytes per weight in GGUF's Q4_K, about


class PreflightNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOPreflight",
            "VRAM Preflight",
            description="What training will need of the GPU's memory, phase by phase, before anything is loaded "
            "there, and what to turn if it does not fit. Estimated from shapes by ComfyUI's own rules; the real need "
            "can differ.",
            search_aliases=["memory", "vram", "out of memory", "estimate"],
            is_output_node=True,
            inputs=[
                PolicySocket.Input("policy"),
                io.Latent.Input("latent_image", tooltip="An empty latent of the size you want to train at."),
                ShapeSocket.Input("shape", optional=True, tooltip="From Tree Shape. Without it: branching 3, depth 3."),
                io.Int.Input(
                    "per_iteration",
                    default=1,
                    min=1,
                    max=1024,
                    optional=True,
                    tooltip="Prompts per iteration, as in the Trainer.",
                ),
                micro_batch_input(
                    "Latents per model call, as in the Trainer. Lower = less memory. 0 = all.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    optional=True,
                    tooltip="As in the Trainer; other than 1 doubles the batch.",
                ),
                io.Vae.Input("vae", optional=True),
                RewardSocket.Input("reward_model", optional=True),
                expert(io.Boolean.Input("retain_graphs", default=False, optional=True, tooltip="As in the Trainer.")),
                io.Combo.Input(
                    "fit_my_card",
                    options=[THIS, *CARDS],
                    default=THIS,
                    optional=True,
                    tooltip="What to set so that it fits a card of this size, the fastest way first: micro_batch, "
                    "checkpointing, an fp8 base, 8-bit AdamW, part of the model in main memory.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report"),
                io.Int.Output(display_name="micro_batch", tooltip="What fits, for the Trainer's micro_batch."),
                io.Boolean.Output(display_name="free_others", tooltip="What fits, for the Trainer's free_others."),
            ],
        )

    @classmethod
    def execute(
        cls,
        policy,
        latent_image,
        shape=None,
        per_iteration=1,
        micro_batch=0,
        cfg=1.0,
        vae=None,
        reward_model=None,
        retain_graphs=False,
        fit_my_card=THIS,
    ) -> io.NodeOutput:
        latent = start_latent(policy.policy.model, latent_image).shape[1:]
        device = comfy.model_management.get_torch_device()
        room = CARDS.get(fit_my_card) or comfy.model_management.get_total_memory(device)
        run = Foreseen(
            policy.policy,
            latent,
            shape or Shape(tail=0.4),
            per_iteration,
            cfg,
            vae,
            reward_model,
            retain_graphs,
            Plan(micro_batch, policy.policy.checkpointing),
        )
        text = report(run, room, str(device) if fit_my_card == THIS else f"a card of {fit_my_card}")
        plan = run.fitting(room) or run.plan
        return io.NodeOutput(text, plan.micro_batch, run.crowded(plan, room), ui={"text": (text,)})


@dataclass(frozen=True)
class Plan:
    """What can be turned to need less memory."""

    micro_batch: int = 0
    checkpointing: bool = True
    optimizer: str = "adamw"
    fp8: bool = False  # of a base model that is not yet
    offloaded: float = 0.0  # bytes of the model that stay in main memory


@dataclass(frozen=True)
class Foreseen:
    """A training run, and the memory its phases will need."""

    policy: object  # core.hosts.comfy.ComfyPolicy
    latent: tuple
    shape: Shape
    prompts: int
    cfg: float
    vae: object
    reward: object
    retain: bool
    plan: Plan  # as it is set now

    @property
    def widest(self) -> dict[str, int]:
        """Latents per call where all go at once."""
        leaves = self.prompts * self.shape.leaves
        return {"sampling": leaves, "learning": leaves // self.shape.branching}

    def parts(self, plan: Plan, batch: int = 1) -> dict[str, float]:
        """As ComfyPolicy.memory, under this plan."""
        latents = batch * (1 if self.cfg == 1 else 2)
        found = self.policy.memory(self.latent, latents, cast=plan.fp8 or None, checkpointing=plan.checkpointing)
        found["weights"] *= 1 / self.policy.model.model_dtype().itemsize if plan.fp8 else 1
        found["weights"] -= plan.offloaded
        found["adapters"] *= EIGHT_BIT if plan.optimizer == "adamw8bit" else 1
        return found

    def phase(self, name: str, plan: Plan) -> float:
        """Bytes of "sampling" or "learning"."""
        found = self.parts(plan, min(plan.micro_batch or self.widest[name], self.widest[name]))
        kept = 0.0
        if self.retain and name == "sampling":
            kept = found["graph"] * (1 if self.cfg == 1 else 2) * self.prompts * self.shape.trees
            kept *= sum(self.shape.branching**k for k in range(self.shape.depth))
        return found["weights"] + found["adapters"] + found[name] + kept

    def needs(self, plan: Plan) -> dict[str, float]:
        """Bytes of each phase."""
        found = {name: self.phase(name, plan) for name in ("sampling", "learning")}
        if self.vae is not None:
            frames = (
                self.latent[1:-2] if getattr(self.vae, "latent_dim", 2) == 3 else ()
            )  # as VAE.decode drops the time
            decoded = (DECODED_AT_ONCE, self.latent[0], *frames, *self.latent[-2:])
            found["decoding"] = self.vae.patcher.model_size() + self.vae.memory_used_decode(decoded, self.vae.vae_dtype)
        scorers = models(self.reward)
        if scorers:
            found["scoring"] = max(
                model.model_size() + min(ACTIVATIONS * model.model_size(), MOST_ACTIVATIONS) for model in scorers
            )
        return found

    def batch(self, plan: Plan, room: float) -> int | None:
        """The largest micro-batch that fits, or None."""

        def need(batch: int) -> float:  # grows with the batch
            return max(self.phase(name, replace(plan, micro_batch=batch)) for name in self.widest)

        return bisect_right(range(1, max(self.widest.values()) + 1), room, key=need) or None

    def fitting(self, room: float) -> Plan | None:
        """The plan that fits and changes least, the fastest change first; None where nothing does."""
        room -= KEPT_FREE
        plan = self.plan
        if max(self.phase(name, plan) for name in self.widest) <= room:
            return plan
        fp8 = plan.fp8 or self.policy.model.model_dtype().itemsize > 1
        for change in ({}, {"checkpointing": True}, {"fp8": fp8}, {"optimizer": "adamw8bit"}):
            plan = replace(plan, **change)
            if batch := self.batch(plan, room):
                return replace(plan, micro_batch=min(batch, plan.micro_batch or batch))
        one = replace(plan, micro_batch=1)
        over = max(self.phase(name, one) for name in self.widest) - room
        return replace(one, offloaded=over) if over < 0.9 * self.parts(one)["weights"] else None

    def crowded(self, plan: Plan, room: float) -> bool:
        """Whether text encoders aside, what the phases use does not fit beside the model."""
        others = [self.vae.patcher] if self.vae is not None else []
        beside = sum(model.model_size() for model in [*others, *models(self.reward)])
        return max(self.phase(name, plan) for name in self.widest) + beside > room - KEPT_FREE


def report(run: Foreseen, room: float, device: str) -> str:
    """The node's text. room: bytes the device has in all."""
    base, needs = run.parts(run.plan), run.needs(run.plan)
    lines = [
        f"Model {base['weights'] / GB:.1f} GB, LoRA with optimizer {base['adapters'] / GB:.2f} GB; {device} has "
        f"{room / GB:.1f} GB.",
        *(f"{name}: about {need / GB:.1f} GB" for name, need in needs.items()),
    ]
    peak = max(needs.values())
    if peak <= room - KEPT_FREE:
        lines.append(f"It should fit, with {(room - peak) / GB:.1f} GB to spare.")
    elif plan := run.fitting(room):
        lines.append(f"It does not fit at once. {advice(run, plan, room)}")
    else:
        lines.append(
            "It does not fit, and no setting makes it: train at a smaller size, with fewer layers (targets) or a lower "
            "rank, or use a smaller base model."
        )
    return "\n".join(
        [*lines, "Phases follow one another: ComfyUI moves what is not needed off the GPU. Estimated, not measured."]
    )


def advice(run: Foreseen, plan: Plan, room: float) -> str:
    """What to set, in a sentence, and what it then needs."""
    before, said = run.plan, []
    if plan.fp8 and not before.fp8:
        said.append("load the base model in fp8 (weight_dtype fp8_e4m3fn)")
    if plan.checkpointing and not before.checkpointing:
        said.append("turn checkpointing on in Tree Policy")
    if plan.micro_batch != before.micro_batch:
        said.append(f"set micro_batch to {plan.micro_batch}")
    if plan.optimizer != before.optimizer:
        said.append(f"set the Trainer's optimizer to {plan.optimizer}")
    if run.crowded(plan, room):
        said.append("turn free_others on")
    text = f"To make it fit: {', '.join(said)}." if said else "It is the decoding or scoring that needs most."
    if plan.offloaded:
        text += f" About {plan.offloaded / GB:.1f} GB of the model then stay in main memory, by ComfyUI itself (slower)"
        quantized = run.parts(replace(plan, offloaded=0.0))["weights"] * Q4
        text += f"; a GGUF base in Q4 has about {quantized / GB:.1f} GB in all." if plan.fp8 or before.fp8 else "."
    after = max(run.phase(name, plan) for name in run.widest)
    return f"{text} Then about {after / GB:.1f} GB."


def models(reward) -> list:
    """The model patchers behind a reward, if it has weights."""
    from ..core.rewards.combine import parts

    return [model.patcher for model, _ in parts(reward) if model.patcher is not None] if reward is not None else []
