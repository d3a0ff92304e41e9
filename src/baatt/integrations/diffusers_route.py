"""How the attention calls of a diffusers transformer come to a handle, and what a forward of it tells.

In: the arguments of a forward, and calls with query [B, N, H, D]. Out: attention of the same shape. Registers one
backend with diffusers' dispatch while it is attached. Knows the layers of a model only by the number that is set before
a call.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from baatt.integrations.calls import SdpaCall
from baatt.integrations.handle import GRADIENTS, Handle, needs_gradients
from baatt.integrations.progress import TRAINING_TIMESTEPS, by_name
from baatt.integrations.sdpa import Current, SparseSDPA
from baatt.integrations.video import VideoTiles

#: Names under which a forward takes the timestep.
TIMESTEPS = ("timestep", "timesteps", "t")
#: Video transformers that have the text before the latents; others that have it in one sequence have it behind them.
TEXT_BEFORE = ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel")
#: What diffusers keeps its backends in.
TABLES = ("_backends", "_constraints", "_supported_arg_names")


class DiffusersRoute:
    """Brings the attention calls of all layers of a handle to it, with what the calls themselves do not tell.

    Args:
        handle: decides and counts.
        scheduler: asked for the pipeline's scheduler, or None, at every forward.
    """

    def __init__(self, handle: Handle, scheduler: Callable[[], Any]) -> None:
        self.handle, self.scheduler = handle, scheduler
        # Of the processor that runs: its layer [] int64, and the backend that it had.
        self.layer = Current[Tensor | None](None)
        self.former = Current[Any](None)
        # What a timestep of the model counts where no schedule tells: 1 or a thousand, once one has shown it.
        self.unit: int | None = None
        # Of a forward that is traced: its frames, rows and columns, [3] int64, or nothing, [0].
        self.traced: list[Tensor] = []
        # A `VideoTiles` that came without a grid.
        self.tiles: VideoTiles | None = None
        self.dispatch: Any = None  # diffusers', and our member of its enum
        self.member: Any = None
        self.mode = SparseSDPA(self.attention)

    def take_order(self, transformer: nn.Module) -> None:
        """Take over a `VideoTiles` that has no grid; a ValueError for one with the text on another side."""
        order, name = self.handle.order, type(uncompiled(transformer)).__name__
        if not isinstance(order, VideoTiles):
            return
        if name in TEXT_BEFORE and order.text != "before":
            raise ValueError(f"order must be VideoTiles(text='before') for {name}, got text={order.text!r}")
        self.tiles = order if order.grid is None else None
        self.handle.undo.callback(setattr, order, "grid", order.grid)

    def start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward of a transformer: the grid of its latents; a ValueError where nothing tells it."""
        is_traced = torch.compiler.is_compiling()
        grid = None if self.tiles is None else latent_grid(module, args, kwargs)
        # Traced code must not change the order: the graph does when it runs.
        self.traced = [torch.tensor(grid or (), dtype=torch.int64, device="cpu")] if is_traced else []
        if self.tiles is None:
            return
        if grid is None and self.tiles.grid is None:
            raise ValueError(
                f"order must have a grid for {type(module).__name__}, whose latents do not show theirs: "
                "set VideoTiles.grid to the numbers of frames, rows and columns"
            )
        if grid is not None and not is_traced:
            self.tiles.show(grid)

    def read_step(self, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the progress: from the scheduler's own count where it has one, else from the timestep of the forward."""
        if self._read_scheduler(at_start=None):
            return
        given = by_name(names, args, kwargs)
        timestep = next((given[name] for name in TIMESTEPS if given.get(name) is not None), None)
        if timestep is not None:
            timesteps = getattr(self.scheduler(), "timesteps", None)  # one wait for the device, not one an entry
            schedule = [] if timesteps is None else torch.as_tensor(timesteps, device="cpu").double().tolist()
            timestep = torch.as_tensor(timestep, device="cpu").max()
            value = training_timestep(timestep, schedule, self.unit)
            if value is None:
                self.handle.progress.share = None
                return
            if float(timestep) > 1:
                self.unit = 1
            elif value != float(timestep):
                self.unit = self.unit or TRAINING_TIMESTEPS
            self.handle.progress.read_timestep(value, schedule)

    def _read_scheduler(self, at_start: int | None) -> bool:
        """Take the scheduler's index, `at_start` while it has none; whether there was one."""
        scheduler = self.scheduler()
        timesteps = getattr(scheduler, "timesteps", None)
        index = getattr(scheduler, "step_index", None)
        if index is None and hasattr(scheduler, "step_index"):
            index = at_start
        if index is None or timesteps is None or not 0 <= index < len(timesteps):
            return False  # past the end: the loop is over, and this forward belongs to none
        self.handle.progress.share = index / len(timesteps)
        return True

    def attention(self, call: SdpaCall, dense: Callable[[], Tensor]) -> Tensor:
        """`Handle.sdpa` of the layer of the processor that runs; q [B, H, N, D], k and v [B, G, M, D]."""
        layer = self.layer.get()
        if not torch.compiler.is_compiling():
            return self.handle.sdpa(call, dense, layer=None if layer is None else int(layer))
        return dense() if layer is None else self.handle.sdpa(call, dense, told=[layer, *self.traced])

    def hear(self, told: Sequence[Tensor]) -> int:
        """The layer of a call of a compiled graph; told: the layer [], then the grid of a traced forward."""
        number, *traced = told
        for grid in traced:
            if self.tiles is not None and len(grid):
                frames, rows, columns = grid.tolist()
                self.tiles.show((frames, rows, columns))
            if self.handle.policy.dense_steps > 0 and not self.handle.progress.told:
                # No hook has run. Before its first step a scheduler has no index.
                self._read_scheduler(at_start=getattr(self.scheduler(), "begin_index", None) or 0)
        return int(number)

    def register(self) -> None:
        """Register a backend with diffusers, if it is built as we know it."""
        dispatch = _dispatch()
        if dispatch is None:
            return
        names, registry = dispatch.AttentionBackendName, dispatch._AttentionBackendRegistry
        value = f"ba_att_{self.handle.number}"
        member = str.__new__(names, value)
        member._name_, member._value_, member.__objclass__ = value.upper(), value, names
        self.dispatch, self.member = dispatch, member
        registry.register(member, supports_context_parallel=True)(self.backend)
        for table in TABLES:
            self.handle.undo.callback(getattr(registry, table).pop, member, None)
        self.handle.undo.callback(registry._supports_context_parallel.discard, value)

    def backend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        """What diffusers calls: query [B, N, H, D], key and value [B, M, G, D], to [B, N, H, D]."""
        call = SdpaCall(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        layer = self.layer.get()
        if layer is None:  # a layer that we did not attach to uses the same processor
            return self._native(call, _parallel_config)
        if _parallel_config is None:
            return self._local(None, *call)
        if needs_gradients(query, key, value):
            self.handle.count_dense(int(layer), GRADIENTS)
            return self._native(call, _parallel_config)
        gathered: Tensor = self.dispatch._templated_context_parallel_attention(
            *call, False, forward_op=self._local, backward_op=_no_backward, _parallel_config=_parallel_config
        )
        return gathered

    def _local(self, context: Any, query: Tensor, key: Tensor, value: Tensor, *options: Any, **_: Any) -> Tensor:
        """All of a sequence, for the heads that this process has; `options` are the fields of `SdpaCall` in order.

        The signature is that of the forward functions that diffusers' context parallelism calls.
        """
        call = SdpaCall(query, key, value, *options[: len(SdpaCall._fields) - 3])
        q, k, v = (rearrange(x, "b n h d -> b h n d") for x in call[:3])
        mask = call.attn_mask
        if mask is not None and mask.shape == (key.shape[0], key.shape[1]):  # as diffusers' native backend reads it
            mask = rearrange(mask, "b m -> b 1 1 m")
        out = self.attention(
            call.changed(q, k, v, mask, call.scale),
            lambda: rearrange(self._native(call, None), "b n h d -> b h n d"),
        )
        return rearrange(out, "b h n d -> b n h d").contiguous()

    def _native(self, call: SdpaCall, parallel_config: Any) -> Tensor:
        """What the processor would have called."""
        out: Tensor = self.dispatch.dispatch_attention_fn(
            *call, backend=self.former.get(), parallel_config=parallel_config
        )
        return out


def _no_backward(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("sparse attention has no gradient: call the model under torch.no_grad()")


def _dispatch() -> Any:
    try:
        dispatch: Any = importlib.import_module("diffusers.models.attention_dispatch")
    except ImportError:
        return None
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    names = ("AttentionBackendName", "dispatch_attention_fn", "_templated_context_parallel_attention")
    is_known = (
        all(hasattr(dispatch, name) for name in names)
        and all(isinstance(getattr(registry, table, None), dict) for table in TABLES)
        and isinstance(getattr(registry, "_supports_context_parallel", None), set)
    )
    return dispatch if is_known else None


def latent_grid(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int, int] | None:
    """Frames, rows and columns of latent tokens in a forward, or None where it does not show them.

    Most models are given latents [B, C, T, H, W], CogVideoX [B, T, C, H, W], and cut patches of `config.patch_size`
    (three numbers, or one for rows and columns) and `config.patch_size_t`; LTX is given tokens and the three numbers.
    """
    given = by_name(parameters(module), args, kwargs)
    latents = given.get("hidden_states")
    if not isinstance(latents, Tensor):
        return None
    if latents.ndim == 3 and all(isinstance(given.get(name), int) for name in ("num_frames", "height", "width")):
        return given["num_frames"], given["height"], given["width"]
    config = uncompiled(module).config
    channels, patch = getattr(config, "in_channels", None), getattr(config, "patch_size", None)
    if latents.ndim != 5 or patch is None or channels not in latents.shape[1:3]:
        return None
    frames = latents.shape[2 if latents.shape[1] == channels else 1]
    if isinstance(patch, int):
        patch = (getattr(config, "patch_size_t", None) or 1, patch, patch)
    return frames // patch[0], latents.shape[3] // patch[1], latents.shape[4] // patch[2]


def training_timestep(timestep: Any, schedule: Sequence[float], unit: int | None = None) -> float | None:
    """A timestep as schedulers count it, from 1000: Flux is given a thousandth of it, Lumina what is missing to 1.

    None where it may be the first step as well as the last: a 1.0 without a schedule or the unit of earlier ones.
    """
    is_whole = isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point())
    # One value a token where an image is given: its tokens have none to go.
    value = float(timestep.max() if isinstance(timestep, Tensor) else timestep)
    if is_whole or value > 1:
        return value
    if not schedule:
        return None if unit is None and value == 1 else value * (unit or TRAINING_TIMESTEPS)
    candidates = value, value * TRAINING_TIMESTEPS, (1 - value) * TRAINING_TIMESTEPS
    return min(candidates, key=lambda one: min(abs(one - step) / max(abs(step), 1e-3) for step in schedule))


def parameters(module: nn.Module) -> list[str]:
    """Names of the arguments of a forward."""
    return list(inspect.signature(type(uncompiled(module)).forward).parameters)[1:]


def uncompiled(module: nn.Module) -> Any:
    """What `torch.compile` wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)
