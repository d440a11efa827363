"""A ComfyUI MODEL as a trainable velocity model.

ComfyUI runs nodes in inference mode, shares one network among all clones of a MODEL, and updates FLUX's activations
in place. A session gets exact gradients out of it all the same and leaves the network as it was, on every way out.
"""

import math
from contextlib import ExitStack, contextmanager, nullcontext

import comfy.conds
import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.patcher_extension import PatcherInjection
from torch import Tensor, nn

from ..lora.adapters import Adapters, choose_layers
from ..model import Velocity, by_kind
from .architectures import Architecture, architecture_of
from .comfy_gradients import adapted_norms, checkpointed, training_kernels, use_differentiable_attention
from .comfy_memory import MODULATION, TEXT, activations, patch
from .comfy_refusals import refuse_other_than_flow, refuse_wrappers, refuse_wrong_conditioning, refuse_wrong_latent
from .comfy_weights import map_tensors, thaw, thaw_weights

INJECTION = "treerpo"


class ComfyPolicy:
    """The user's MODEL with a trainable LoRA. The MODEL is only changed between the start and the end of a session."""

    def __init__(self, model, adapters: Adapters, checkpointing: bool = False):
        """model: a flow-matching MODEL.

        checkpointing: recompute each block in the backward pass; gradients stay exact.
        """
        refuse_other_than_flow(model)
        self.model, self.adapters, self.checkpointing = model, adapters, checkpointing
        self._static = None

    @classmethod
    def create(
        cls,
        model,
        rank: int,
        alpha: float,
        targets: str,
        dtype=torch.float32,
        seed: int = 0,
        checkpointing: bool = False,
    ) -> "ComfyPolicy":
        return cls(model, cls.new_adapters(model, rank, alpha, targets, dtype, seed), checkpointing)

    @staticmethod
    def new_adapters(model, rank: int, alpha: float, targets: str, dtype=torch.float32, seed: int = 0) -> Adapters:
        refuse_other_than_flow(model)
        presets = architecture_of(model).presets()
        return Adapters.create(model.model.diffusion_model, rank, alpha, targets, dtype, seed, presets)

    @staticmethod
    def layers(model, targets: str) -> dict[str, nn.Module]:
        """The layers of a MODEL that targets name, or a ValueError."""
        return choose_layers(model.model.diffusion_model, targets, architecture_of(model).presets())

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self.model)

    def memory(
        self,
        shape,
        batch: int,
        patcher=None,
        references: float = 0.0,
        text: int = TEXT,
        cast: bool | None = None,
        checkpointing: bool | None = None,
    ) -> dict[str, float]:
        """Bytes, estimated from shapes: `weights`; `adapters` with gradients and AdamW's two moments; activations of a
        call with `batch` latents of `shape` (as in `session`), twice as many with CFG, while `sampling` and while
        `learning`; and `graph`, what one latent keeps until its backward pass. references: size of the reference
        latents that go with each latent, in latents. text: tokens of the prompt. cast: whether weights are cast to
        compute with; None = as this MODEL does. checkpointing: None = as this policy does.
        """
        patcher = patcher or self.model
        network = patcher.model.diffusion_model
        computed = getattr(patcher.model, "manual_cast_dtype", None)
        tokens = (1 + references) * math.prod(shape[1:]) / patch(self.model) ** 2 + text
        item = (computed or patcher.model_dtype()).itemsize
        casts = computed is not None if cast is None else cast
        how = dict(cast=casts, timed=any(map(MODULATION.search, self.adapters.names)))
        how["checkpointing"] = self.checkpointing if checkpointing is None else checkpointing
        one, many = (activations(network, tokens * count, item, **how) for count in (1, batch))
        # ComfyUI's own rule, made for its samplers, knows what is special in a family
        usual = (1 + references) * patcher.model.memory_required([batch, *shape])
        return {
            "weights": patcher.model_size(),
            "adapters": 4 * sum(p.numel() * p.element_size() for p in self.adapters.parameters()),
            "sampling": max(usual, many["sampling"]),
            "learning": max(usual, many["learning"]),
            "graph": one["graph"],
        }

    @contextmanager
    def session(
        self,
        positive,
        negative=None,
        cfg: float = 1.0,
        *,
        shape,
        sigmas: Tensor | None = None,
        memory_batch: int | None = None,
        alone: bool = False,
    ):
        """The policy on its device, ready to sample and to train: yields a ComfyVelocity; gradients are off outside its
        grad().

        positive, negative: CONDITIONING with a row per prompt (the negative: one row for all, or as many), in one entry
        or in several of comfy_host.batch. shape: (C, H, W) of the latents, or (C, 1, H, W) where the model's have a
        time. sigmas: the schedule, which some patches of a MODEL ask for. memory_batch: latents per model call, for the
        memory estimate; None = one per prompt. alone: whenever it loads, all other models leave the device. Bad input
        raises ValueError before anything is loaded or sampled.
        """
        refuse_wrong_latent(self.model, shape)
        with torch.inference_mode(False), torch.no_grad():
            texts = {"positive": thaw(positive)} | ({"negative": thaw(negative)} if negative is not None else {})
            places = refuse_wrong_conditioning(self, texts, cfg)
            prompts = len(places["positive"])
            velocity = ComfyVelocity(self, self._clone(), cfg, tuple(shape), places, memory_batch or prompts, alone)
            with ExitStack() as stack:
                stack.enter_context(training_kernels())
                stack.callback(velocity.close)
                velocity.open(texts, sigmas)
                yield velocity

    def _clone(self):
        """A clone of the MODEL to train through.

        Dynamic VRAM may drop weights that autograd still needs, so it is left out.
        """
        if not getattr(self.model, "is_dynamic", bool)():
            return self.model.clone()
        if self._static is None:
            try:
                self._static = self.model.get_non_dynamic_delegate()  # ComfyUI loads the file again, once per MODEL
            except RuntimeError as error:
                raise ValueError(
                    "This MODEL cannot be trained with dynamic VRAM: load it with one of ComfyUI's own loader nodes, "
                    "or start ComfyUI with --disable-dynamic-vram."
                ) from error
        return self._static.clone()


class ComfyVelocity(Velocity):
    """`velocity(x, sigma, rows) -> v` of a policy, alive inside its session. `forwards` counts latents through the
    network, twice where CFG runs a second pass.
    """

    def __init__(
        self, policy: ComfyPolicy, patcher, cfg: float, shape: tuple, places: dict, memory_batch: int, alone: bool
    ):
        self.policy, self.cfg, self.shape = policy, cfg, shape
        self.prompts = len(places["positive"])
        self.device = patcher.load_device
        self.forwards = 0
        # Inference mode spares each small operation its autograd bookkeeping, 5 % of a tiny SD3's time. Only for
        # networks known to keep no tensor from one call to the next, which a backward pass could then not use.
        self._inference = policy.architecture.forgets
        self._patcher, self._batch, self._alone = patcher, memory_batch, alone
        self._latent_format = patcher.model.latent_format
        self._in_training = False
        self._conds, self._options, self._models, self._norms = {}, None, [], []
        self._guider = _Guider(self, patcher)
        self._places = places  # for positive and negative, of each prompt: (its entry, its row there)
        self._selected = {}  # entries -> (prompts of the newest call with them, their conditioning)

    def open(self, texts: dict, sigmas: Tensor | None) -> None:
        """Process the conditioning as ComfyUI's samplers do, and load the model with the adapters on."""
        patcher = self._patcher
        patcher.set_injections(INJECTION, [PatcherInjection(self._inject, self._eject)])
        self._conds = {key: comfy.sampler_helpers.convert_cond(entries) for key, entries in texts.items()}
        comfy.samplers.preprocess_conds_hooks(self._conds)
        self._options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
        comfy.sampler_helpers.prepare_model_patcher(patcher, self._conds, self._options)
        refuse_wrappers(self._options["transformer_options"].get("wrappers", {}))
        if sigmas is not None:
            self._options["transformer_options"]["sample_sigmas"] = thaw(sigmas).to(self.device)
        self._guider.model_options = self._options
        comfy.samplers.filter_registered_hooks_on_conds(self._conds, self._options)
        comfy.samplers.cast_to_load_options(self._options, device=self.device, dtype=patcher.model_dtype())
        use_differentiable_attention(self._options["transformer_options"])
        self._models, self._control_memory = comfy.sampler_helpers.get_additional_models(
            self._conds, patcher.model_dtype()
        )
        self._load()
        noise = torch.zeros(1, *self.shape, device=self.device)
        try:
            self._conds = comfy.samplers.process_conds(patcher.model, noise, self._conds, self.device)
        except KeyError as error:
            raise ValueError(
                f"The conditioning has no {error}, which this {self.policy.architecture.name} model needs: encode the "
                "prompt with the text encoder that belongs to the model."
            ) from error
        for entries in self._conds.values():
            for entry in entries:
                entry["model_conds"] = {
                    key: cond._copy_with(map_tensors(cond.cond, lambda t: t.to(self.device)))
                    for key, cond in entry["model_conds"].items()
                }

    def close(self) -> None:
        patcher, self._patcher = self._patcher, None
        try:
            patcher.cleanup()
            comfy.sampler_helpers.cleanup_models(self._conds, self._models)
            comfy.samplers.cast_to_load_options(self._options, device=patcher.offload_device)
            patcher.restore_hook_patches()
        finally:
            patcher.eject_model()
            patcher.remove_injections(INJECTION)
            self._eject(patcher)
            self._conds, self._selected, self._guider = {}, {}, None

    def _load(self) -> None:
        """Bring model and adapters to the device. Also where another node's load has taken them off meanwhile."""
        patcher = self._patcher
        adapters = self.policy.adapters.to(self.device)
        models = self._models + patcher.get_nested_additional_models()
        if self._alone:
            loaded = comfy.model_management.current_loaded_models
            comfy.model_management.free_memory(
                1e30, self.device, keep_loaded=[entry for entry in loaded if entry.model in (patcher, *models)]
            )
        comfy.model_management.load_models_gpu(
            [patcher, *models], memory_required=self._memory() + self._control_memory
        )
        thaw_weights(patcher.model)
        patcher.pre_run()
        if not patcher.is_injected:
            raise RuntimeError(f"ComfyUI did not put the {len(adapters.names)} adapters on the model.")

    def _memory(self) -> float:
        """Bytes beside the weights, for ComfyUI to make room."""
        estimate = self._estimate(self._batch)
        return estimate["learning" if self._in_training else "sampling"] + estimate["adapters"]

    def graph_bytes(self) -> float | None:
        """A checkpointed block's inputs are kept where autograd's hooks do not see them."""
        return self._estimate(1)["graph"] if self.policy.checkpointing else None

    def _estimate(self, latents: int) -> dict[str, float]:
        """ComfyPolicy.memory of a call with so many latents, CFG included."""
        overridden = bool(self._options["transformer_options"].get("wrappers", {}).get("predict_noise"))
        passes = 2 if "negative" in self._conds and (overridden or not math.isclose(self.cfg, 1.0)) else 1
        references = _references(self._patcher.model, self._conds["positive"]) / math.prod(self.shape[1:])
        contexts = [entry.get("cross_attn") for entries in self._conds.values() for entry in entries]
        text = max((context.shape[1] for context in contexts if context is not None), default=TEXT)
        found = self.policy.memory(self.shape, latents * passes, self._patcher, references, text)
        return found | {"graph": passes * found["graph"]}

    def _inject(self, patcher) -> None:
        self._eject(patcher)
        network = patcher.model.diffusion_model
        self.policy.adapters.inject(network)
        if self.policy.architecture.in_place:
            self._norms = adapted_norms(network)

    def _eject(self, patcher) -> None:
        self.policy.adapters.eject()
        while self._norms:
            self._norms.pop().remove()

    def __call__(self, x: Tensor, sigma, rows) -> Tensor:
        """x: [B, C, H, W] as the model sees latents, [B, C, 1, H, W] where they have a time; sigma: number or [B] in
        (0, 1]; rows: prompt of each sample, [B]. -> velocity of x's shape, fp32.
        """
        if self._patcher is None:
            raise RuntimeError("This velocity belongs to a session that is over: open a new one.")
        if not self._patcher.is_injected:
            self._load()
        if x.shape[1:-2] != self.shape[:-2]:
            raise ValueError(
                f"The latent has the shape {list(x.shape)}, but this model needs "
                f"[batch, {', '.join(map(str, self.shape[:-2]))}, height, width]."
            )
        x = x.to(self.device, torch.float32)
        if torch.is_tensor(sigma):
            sigma = sigma.to(self.device, torch.float32).expand(len(x))
        else:
            sigma = torch.full((len(x),), sigma, dtype=torch.float32, device=self.device)
        rows = self._checked(rows, len(x))

        def call(own: list[int]) -> Tensor:
            every = len(own) == len(x)
            return self._call(*((x, sigma) if every else (x[own], sigma[own])), [rows[place] for place in own])

        return by_kind([self._entries(row) for row in rows], call)

    def _entries(self, row: int) -> tuple[int, ...]:
        """The entries of a prompt; latents of the same ones share a call."""
        return tuple(places[row][0] for places in self._places.values())

    def _call(self, x: Tensor, sigma: Tensor, rows: list[int]) -> Tensor:
        conds = self._of_rows(rows)
        fast = self._inference and not torch.is_grad_enabled()
        with torch.inference_mode() if fast else nullcontext():  # inference_mode(False) would turn gradients on
            self._guider.conds = conds
            denoised = self._guider(x, sigma, model_options=self._options)
        return (x - denoised) / sigma.view(-1, *[1] * (x.dim() - 1))

    def _checked(self, rows, batch: int) -> list[int]:
        rows = rows.tolist() if torch.is_tensor(rows) else list(rows)
        if len(rows) != batch:
            raise ValueError(f"There are {len(rows)} prompt rows for {batch} latents: one each.")
        if rows and not 0 <= min(rows) <= max(rows) < self.prompts:
            wrong = next(row for row in rows if not 0 <= row < self.prompts)
            raise ValueError(
                f"Prompt row {wrong} does not exist: the conditioning has {self.prompts} prompts, counted from 0."
            )
        return rows

    def _of_rows(self, rows: list[int]) -> dict:
        """The conditioning of these prompts of the same entries, kept for the next call, which mostly asks for it."""
        entries, key = self._entries(rows[0]), tuple(rows)
        if self._selected.get(entries, (None, None))[0] != key:
            conds = {}
            for (side, places), number in zip(self._places.items(), entries):
                index = torch.tensor([places[row][1] for row in rows], device=self.device)
                count = len({row for entry, row in places if entry == number})
                entry = self._conds[side][number]
                conds[side] = [_select(entry, index, count) if count > 1 else entry]
            self._selected[entries] = key, conds
        return self._selected[entries][1]

    @contextmanager
    def grad(self):
        """Gradients with respect to the adapters are recorded inside. Call backward inside as well."""
        if not (self._in_training and self._patcher.is_injected):
            self._in_training = True
            self._load()  # now with room for what the backward pass keeps; and a recomputed block needs the adapters on
        network = self._patcher.model.diffusion_model
        with torch.enable_grad(), checkpointed(network) if self.policy.checkpointing else nullcontext():
            yield

    @contextmanager
    def reference(self):
        """The user's own model: the adapters do nothing inside."""
        with self.policy.adapters.disabled():
            yield

    def parameters(self):
        return self.policy.adapters.parameters()

    def weights(self):
        """Every tensor of the network and the adapters that outlives a forward."""
        return [*self._patcher.model.diffusion_model.parameters(), *self.policy.adapters.parameters()]

    def free_memory(self) -> float:
        """Bytes that may still be used on the device."""
        return comfy.model_management.get_free_memory(self.device)

    def process_in(self, latent: Tensor) -> Tensor:
        """A LATENT's samples as the model sees them.

        Like ComfyUI's samplers, an empty (all zero) latent is not shifted.
        """
        latent = thaw(latent)
        return self._latent_format.process_in(latent) if torch.count_nonzero(latent) else latent

    def process_out(self, latent: Tensor) -> Tensor:
        return self._latent_format.process_out(latent.to(torch.float32))


class _Guider(comfy.samplers.CFGGuider):
    """ComfyUI's own guider, so that what wraps its prediction (CFGOverride) does as under a KSampler."""

    def __init__(self, velocity: ComfyVelocity, patcher):
        super().__init__(patcher)
        self.velocity, self.inner_model, self.cfg = velocity, patcher.model, velocity.cfg

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        """Also where a wrapper has set another CFG, or calls it more than once."""
        guided = not math.isclose(self.cfg, 1.0)
        if guided and "negative" not in self.conds:
            raise ValueError(
                f"This MODEL sets cfg to {self.cfg}, which needs a negative prompt: connect negative, or the MODEL "
                "without CFG Override."
            )
        two = "negative" in self.conds and (guided or model_options.get("disable_cfg1_optimization", False))
        self.velocity.forwards += len(x) * (2 if two else 1)
        return super().predict_noise(x, timestep, model_options, seed)


def _select(entry: dict, index: Tensor, prompts: int) -> dict:
    """The entry with only these rows of every tensor that has a row per prompt; one-row tensors serve all prompts."""

    def rows(tensor):
        return tensor.index_select(0, index) if tensor.dim() and tensor.shape[0] == prompts else tensor

    chosen = {}
    for key, cond in entry["model_conds"].items():
        constant = isinstance(cond, comfy.conds.CONDConstant)
        chosen[key] = cond if constant else cond._copy_with(map_tensors(cond.cond, rows))
    return {**entry, "model_conds": chosen}


def _references(model, entries: list) -> int:
    """The most that any of these entries refers to, in latent pixels: ComfyUI's own count, but for a single latent."""
    keys = getattr(model, "memory_usage_factor_conds", ())
    shapes = [model.extra_conds_shapes(**entry) for entry in entries] if keys else []
    return max((sum(math.prod(found[key][2:]) for key in keys if key in found) for found in shapes), default=0)
