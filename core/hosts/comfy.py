"""A ComfyUI MODEL as a trainable velocity model.

ComfyUI runs nodes in inference mode, shares one network among all clones of a MODEL, and updates FLUX's activations
in place. A session gets exact gradients out of it all the same and leaves the network as it was, on every way out.
"""

import hashlib
import math
import re
from contextlib import ExitStack, contextmanager, nullcontext

import comfy.conds
import comfy.ldm.modules.attention
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.patcher_extension import PatcherInjection
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..lora.adapters import Adapters, choose_layers
from ..model import Velocity, by_kind
from .architectures import Architecture, architecture_of

try:
    import comfy_kitchen
    from comfy_kitchen.backends.eager import rope as comfy_kitchen_plain
except ImportError:  # older ComfyUI
    comfy_kitchen = None

INJECTION = "treerpo"
FUSED = tuple(
    f"{op}{half}{one}" for op in ("apply_rope", "rms_rope") for half in ("", "_split_half") for one in ("", "1")
)
WHOLE_RUN = ("outer_sample", "prepare_sampling", "sampler_sample")  # wrappers that need a KSampler's whole run
# Activations in units of tokens times a block's width; counted with a LoRA of rank 32 on the attention, see activations
SAMPLING, KEPT, BACKWARD = 31.0, 20.5, 20.0  # of a forward; of what one block keeps; of a block's backward beside that
TEXT = 256  # tokens of a prompt where it is not known yet: FLUX's T5 gives as many at least
MODULATION = re.compile(r"(^|[._])(mod|modulation|adaln)", re.IGNORECASE)
ROWS = "treerpo_rows"  # option of an entry of Tree Prompts' CONDITIONING: the numbers of its prompts


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
                stack.enter_context(_training_kernels())
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
        _use_differentiable_attention(self._options["transformer_options"])
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
                    key: cond._copy_with(_map(cond.cond, lambda t: t.to(self.device)))
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
        with torch.enable_grad(), _checkpointed(network) if self.policy.checkpointing else nullcontext():
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


def thaw(tree):
    """Copies of all tensors of nested dicts, lists and tuples that autograd may use; anything else as it is."""
    with torch.inference_mode(False):
        return _map(tree, lambda tensor: tensor.detach().clone())


def _map(tree, change):
    if torch.is_tensor(tree):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _map(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([_map(value, change) for value in tree])
    return tree


def thaw_weights(model: nn.Module) -> None:
    """Replace weights made in inference mode by normal, frozen ones.

    The memory stays the same, so pinned weights stay pinned.
    """
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not _autograd_can_save(parameter):
                module._parameters[name] = nn.Parameter(_normal(parameter), requires_grad=False)
            elif parameter is not None and parameter.requires_grad:
                parameter.requires_grad_(False)
        for name, buffer in module._buffers.items():
            if buffer is not None and not _autograd_can_save(buffer):
                module._buffers[name] = _normal(buffer)
        # ComfyUI's bypass loaders keep a LoRA's tensors in an object behind the layer's swapped forward
        adapter = getattr(getattr(vars(module).get("forward"), "__self__", None), "adapter", None)
        if isinstance(getattr(adapter, "weights", None), (tuple, list)):
            adapter.weights = type(adapter.weights)(
                _normal(part) if torch.is_tensor(part) and not _autograd_can_save(part) else part
                for part in adapter.weights
            )


def _autograd_can_save(tensor: Tensor) -> bool:
    """False for an inference tensor, and for one that was: moved by `.to` outside inference mode it no longer says
    is_inference(), and still has no version counter."""
    if tensor.is_inference():
        return False
    try:
        return tensor._version >= 0
    except RuntimeError:
        return False


def _normal(tensor: Tensor) -> Tensor:
    # packed weights know how to copy themselves, but ComfyUI-GGUF's do not
    if type(tensor) not in (Tensor, nn.Parameter):
        copied = tensor.detach().clone()
        if _autograd_can_save(copied):
            return copied
        copied = _normal(tensor.as_subclass(Tensor)).as_subclass(type(tensor))
        vars(copied).update(vars(tensor))
        return copied
    fresh = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return fresh.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _select(entry: dict, index: Tensor, prompts: int) -> dict:
    """The entry with only these rows of every tensor that has a row per prompt; one-row tensors serve all prompts."""

    def rows(tensor):
        return tensor.index_select(0, index) if tensor.dim() and tensor.shape[0] == prompts else tensor

    chosen = {}
    for key, cond in entry["model_conds"].items():
        constant = isinstance(cond, comfy.conds.CONDConstant)
        chosen[key] = cond if constant else cond._copy_with(_map(cond.cond, rows))
    return {**entry, "model_conds": chosen}


def _references(model, entries: list) -> int:
    """The most that any of these entries refers to, in latent pixels: ComfyUI's own count, but for a single latent."""
    keys = getattr(model, "memory_usage_factor_conds", ())
    shapes = [model.extra_conds_shapes(**entry) for entry in entries] if keys else []
    return max((sum(math.prod(found[key][2:]) for key in keys if key in found) for found in shapes), default=0)


def adapted_norms(network: nn.Module) -> list:
    """Hooks that give every LayerNorm a copy of its own."""
    return [
        layer.register_forward_pre_hook(_own_input) for layer in network.modules() if isinstance(layer, nn.LayerNorm)
    ]


def _own_input(layer, args):
    """FLUX adds to the very tensor a LayerNorm has just saved for its backward: give the norm a copy of its own."""
    return (args[0].clone(), *args[1:]) if torch.is_grad_enabled() else None


def _blocks(network: nn.Module) -> list[nn.Module]:
    return [block for stack in network.children() if isinstance(stack, nn.ModuleList) for block in stack]


@contextmanager
def _checkpointed(network: nn.Module):
    """Every block of the network recomputes its activations in the backward pass."""
    with ExitStack() as stack:
        for block in _blocks(network):
            stack.callback(_restore, block, vars(block).get("forward"))
            block.forward = _recomputing(block.forward)
        yield


def _restore(block: nn.Module, forward) -> None:
    if forward is None:
        del block.forward
    else:
        block.forward = forward


def _recomputing(forward):
    def own(value):
        # [B, tokens, width] is what blocks update in place; the checkpoint's saved inputs must not change.
        return value.clone() if torch.is_tensor(value) and value.dim() == 3 else value

    def run(args, kwargs):
        return forward(*map(own, args), **{key: own(value) for key, value in kwargs.items()})

    def wrapped(*args, **kwargs):
        if isinstance(kwargs.get("transformer_options"), dict):
            kwargs["transformer_options"] = dict(kwargs["transformer_options"])  # block_index in there moves on
        return checkpoint(run, args, kwargs, use_reentrant=False, preserve_rng_state=False)

    return wrapped


@contextmanager
def _training_kernels():
    """ComfyUI's differentiable kernels, for rollouts too, so that the first ratio is exactly 1.

    Versions before 0.14 have only those. Not every network asks whether it is in training (Anima, ERNIE-Image and
    JoyImage call fused kernels all the same): those are replaced by comfy_kitchen's own plain versions.
    """
    with ExitStack() as stack:
        if hasattr(comfy.model_management, "in_training"):
            stack.enter_context(_set(comfy.model_management, "in_training", True))
        for name in FUSED if comfy_kitchen is not None else ():
            plain = getattr(comfy_kitchen_plain, name, None)
            if plain is not None and hasattr(comfy_kitchen, name):
                stack.enter_context(_set(comfy_kitchen, name, plain))
        yield


@contextmanager
def _set(owner, name: str, value):
    """owner.name is value inside."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _use_differentiable_attention(transformer_options: dict) -> None:
    """PyTorch's attention where ComfyUI runs with one that has no backward pass (sage, flash, int8)."""
    attention = comfy.ldm.modules.attention
    fine = [
        getattr(attention, f"attention_{name}", None) for name in ("pytorch", "basic", "split", "sub_quad", "xformers")
    ]
    if attention.optimized_attention not in fine:
        transformer_options.setdefault(
            "optimized_attention_override", lambda _, *args, **kwargs: attention.attention_pytorch(*args, **kwargs)
        )


def patched(model) -> str:
    """What a MODEL's weights are patched with, such as LoRAs: 'none', or how many weights and a digest of the patches.

    The digest is of names, strengths and the tensors' sizes and sums, so it is the same after a restart.
    """
    parts = [f"{key} {_described(model.patches[key])}" for key in sorted(model.patches, key=str)]
    parts += sorted(str(name) for name in getattr(model, "injections", {}))  # bypass loaders
    digest = hashlib.blake2b("\n".join(parts).encode(), digest_size=4).hexdigest()
    return f"{len(parts)} weights, {digest}" if parts else "none"


def _described(value) -> str:
    """Everything that is fixed of a patch, as text."""
    if torch.is_tensor(value):
        return f"{tuple(value.shape)} {float(value.double().sum()):.6e}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_described, value))}]"
    if hasattr(value, "weights"):  # comfy.weight_adapter
        return f"{type(value).__name__} {_described(value.weights)}"
    return repr(value) if isinstance(value, (int, float, str, type(None))) else type(value).__name__


def refuse_other_than_flow(model) -> None:
    """ValueError for a MODEL that cannot be trained, whatever the settings."""
    architecture = architecture_of(model)
    if architecture.untrainable:
        raise ValueError(f"{architecture.name} cannot be trained here: {architecture.untrainable}.")
    sampling = model.get_model_object("model_sampling")
    other = getattr(comfy.model_sampling, "IMG_TO_IMG_FLOW", ())  # begins from an image, and predicts another
    if not isinstance(sampling, comfy.model_sampling.CONST) or isinstance(sampling, other):
        raise ValueError(
            f"This MODEL ({type(model.model).__name__}) is not a flow-matching model: connect FLUX, SD3, SD3.5 or "
            "another flow model; SD1.5 and SDXL cannot be trained here."
        )
    scale = getattr(sampling, "noise_scale", 1.0)
    if scale != 1:
        raise ValueError(
            f"This MODEL is drawn from noise of scale {scale:g}, and only such of scale 1 can be trained: take out "
            "Model Noise Scale; HiDream-O1 cannot be trained here."
        )


def refuse_wrappers(wrappers: dict) -> None:
    """ValueError for what wraps a KSampler's whole run: there is none here."""
    for kind in WHOLE_RUN:
        for key, found in wrappers.get(kind, {}).items():
            for wrapper in found:
                name = key or getattr(wrapper, "__qualname__", type(wrapper).__name__)
                raise ValueError(
                    f"This MODEL carries '{name}' ({kind}), which works on a whole KSampler run and cannot be honoured "
                    "in a tree: connect the MODEL as it is before the node that adds it."
                )


def patch(model) -> int:
    """Latents per token, in each direction: sides that are no multiple of it the network pads, and draws less well."""
    network = model.model.diffusion_model
    sizes = (getattr(network, name, None) for name in ("patch_size", "patch", "patch_spatial"))
    size = next((size for size in sizes if size is not None), 1)
    return int(size if isinstance(size, int) else size[-1])


def activations(
    network: nn.Module, tokens: float, item: int, checkpointing: bool, cast: bool, timed: bool = False
) -> dict[str, float]:
    """Bytes beside the weights: of a forward ("sampling"), of what its graph keeps ("graph"), and of a forward with its
    backward ("learning").

    tokens: of images and texts, of all latents of the call. item: bytes of an activation. cast: whether weights are
    cast to compute with (fp8 ones, above all): autograd holds on to the cast copies. timed: a gradient also goes
    through layers that work on the time alone. In units of tokens times the blocks' width; the numbers were counted on
    networks of true size (benchmarks/allocations.py).
    """
    blocks = _blocks(network)
    widths = [_width(block) for block in blocks] or [1]
    unit = tokens * item
    layers = [_cast_weights(block, timed) if cast else [] for block in blocks]
    copies = [item * sum(layer) for layer in layers] or [0]
    within = KEPT * max(widths) * unit + max(copies)  # of one block
    if checkpointing:
        every = (sum(widths) + max(widths)) * unit
    else:
        whole = item * sum(_cast_weights(network, timed)) if cast and timed else sum(copies)
        every = KEPT * sum(widths) * unit + whole
    return {
        "sampling": SAMPLING * max(widths) * unit + item * max(map(max, filter(None, layers)), default=0),
        "graph": every,
        "learning": every + BACKWARD * max(widths) * unit + (within if checkpointing else 0),
    }


def _width(block: nn.Module) -> int:
    """Features per token: what most of a block's Linear layers take."""
    sizes = [layer.in_features for layer in block.modules() if isinstance(getattr(layer, "in_features", None), int)]
    return max(set(sizes), key=lambda size: (sizes.count(size), -size)) if sizes else 0


def _cast_weights(module: nn.Module, timed: bool) -> list[int]:
    """Numbers in each Linear layer in there; those that work on the time alone only where timed."""
    return [
        layer.in_features * layer.out_features
        for name, layer in module.named_modules()
        if isinstance(getattr(layer, "in_features", None), int)
        and isinstance(getattr(layer, "out_features", None), int)
        and (timed or not MODULATION.search(name))
    ]


def refuse_wrong_latent(model, shape) -> None:
    """ValueError unless latents of this shape, without the batch, are images of this MODEL."""
    form = model.model.latent_format
    wanted = [*["channels", 1][: form.latent_dimensions - 1], "height", "width"]
    if form.latent_dimensions < 2:
        raise ValueError(
            f"This MODEL ({type(model.model).__name__}) draws no images, and only images can be trained on."
        )
    if len(shape) == len(wanted) == 4 and shape[1] > 1:
        raise ValueError(
            f"The latent is a video of {shape[1]} latent frames, and only images can be trained on: set the length of "
            "the empty latent to 1."
        )
    if len(shape) != len(wanted):
        raise ValueError(
            f"The latent has the shape {['batch', *shape]}, but only images, {['batch', *wanted]}, can be trained on."
        )
    if shape[0] != form.latent_channels:
        raise ValueError(
            f"The latent has {shape[0]} channels, but this model needs {form.latent_channels}: connect an empty "
            "latent, or encode your picture with the VAE that belongs to the model."
        )


def refuse_wrong_conditioning(policy: ComfyPolicy, texts: dict, cfg: float) -> dict[str, list[tuple[int, int]]]:
    """For each side, of each prompt, its entry and its row there; or a ValueError that says what is wrong."""
    if not math.isclose(cfg, 1.0) and "negative" not in texts:
        raise ValueError(f"cfg is {cfg}, which needs a negative prompt: connect negative, or set cfg to 1.")
    found = {}
    for side, entries in texts.items():
        found[side] = places_of(side, entries)
        for context, options in entries:
            start, end = options.get("start_percent", 0.0), options.get("end_percent", 1.0)
            if any(options.get(key) is not None for key in ("area", "mask")) or start > 0 or end < 1:
                raise ValueError(
                    f"The {side} conditioning is limited to an area, a mask or a range of steps: connect the plain "
                    "prompt."
                )
            _refuse_wrong_widths(policy, side, context, options, context.shape[0])
    prompts, count = (len(found.get(side, found["positive"])) for side in ("positive", "negative"))
    if count not in (1, prompts):
        raise ValueError(
            f"The negative conditioning has {count} prompts for {prompts} positive ones: use one for all, or as many."
        )
    return {side: places * (prompts // len(places)) for side, places in found.items()}


def places_of(side: str, entries: list) -> list[tuple[int, int]]:
    """Of each prompt: the number of its entry, and its row there."""
    if len(entries) == 1 and ROWS not in entries[0][1]:
        return [(0, row) for row in range(entries[0][0].shape[0])]
    numbers = [options.get(ROWS, ()) for _, options in entries]
    places = {prompt: (entry, row) for entry, prompts in enumerate(numbers) for row, prompt in enumerate(prompts)}
    rows = [context.shape[0] for context, _ in entries]
    if not entries or rows != list(map(len, numbers)) or sorted(places) != list(range(sum(rows))):
        raise ValueError(
            f"The {side} conditioning has {len(entries)} entries, and ComfyUI would average them: connect a single "
            "prompt, or all of several from Tree Prompts."
        )
    return [places[prompt] for prompt in range(sum(rows))]


def _refuse_wrong_widths(policy: ComfyPolicy, side: str, context: Tensor, options: dict, count: int) -> None:
    layers, architecture = dict(policy.model.model.diffusion_model.named_modules()), policy.architecture
    advice = f"encode the prompt with the text encoder that belongs to this {architecture.name} model"

    def width(name: str) -> int | None:
        """Input width of this layer, if the network has it."""
        return getattr(layers.get(name), "in_features", None)

    wanted = width(architecture.text)
    if wanted is not None and context.shape[-1] != wanted:
        raise ValueError(
            f"The {side} conditioning is {context.shape[-1]} wide, but the model needs {wanted}: {advice}."
        )
    pooled, wanted = options.get("pooled_output"), width(architecture.pooled)
    if pooled is None:
        if architecture.needs_pooled:
            raise ValueError(
                f"The {side} conditioning has no 'pooled_output', which this {architecture.name} model needs: {advice}."
            )
        return
    if pooled.shape[0] not in (1, count):
        raise ValueError(
            f"The {side} conditioning has {count} prompts but {pooled.shape[0]} rows of 'pooled_output': {advice}."
        )
    given = pooled.shape[-1]
    if wanted is not None and (given < wanted if architecture.pooled_first else given != wanted):
        raise ValueError(
            f"'pooled_output' of the {side} conditioning is {given} wide, but the model needs {wanted}: {advice}."
        )
