"""How the attention calls of a diffusers transformer come to a handle, and what a forward of it tells.

In: the arguments of a forward, and calls with query [B, N, H, D]. Out: attention of the same shape. Knows the layers of
a model, and what their queries attend to, only by what is set before a processor runs.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import _pop_mode_temporarily

from baatt.integrations.calls import SdpaCall, needs_gradients
from baatt.integrations.diffusers_dispatch import find_dispatch, watcher
from baatt.integrations.handle import Handle
from baatt.integrations.progress import TRAINING_TIMESTEPS, by_name
from baatt.integrations.reasons import BY_POLICY, GRADIENTS
from baatt.integrations.sdpa import Current, SparseSDPA
from baatt.integrations.video import VideoTiles

_modes: Any = torch.overrides._get_current_function_mode_stack  # which has no types

#: Names under which a forward takes the timestep.
TIMESTEPS = ("timestep", "timesteps", "t")
#: Video transformers that have the text before the latents; others that have it in one sequence have it behind them.
TEXT_BEFORE = ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel")
FEWER = BY_POLICY + "fewer keys than queries, those of another sequence or a part of this one"
UNKNOWN = (
    BY_POLICY
    + "keys of another number than queries, and the name of a backend does not tell whether of another sequence: "
    "Policy(only_self_attention=False) makes them sparse"
)


class Run(NamedTuple):
    """What is known while a processor runs.

    layer: its number [] int64, or None where there is none.
    others: tokens of another sequence that it is given, or None; is_apart: whether it attends to those alone.
    arrived: an entry per call that came.
    """

    layer: Tensor | None
    others: int | None
    is_apart: bool
    arrived: list[bool]

    def is_cross(self, queries: int, keys: int) -> bool | None:
        """Whether so many keys are those of another sequence; None where that may be.

        More keys than queries are those of a joint sequence or of a cache, unless they are as many as the other has.
        """
        if self.others is not None and keys == self.others and (self.is_apart or keys != queries):
            return True
        return None if keys < queries or (self.layer is None and keys != queries) else False


class DiffusersRoute:
    """Brings the attention calls of all layers of a handle to it, with what the calls themselves do not tell.

    Args:
        handle: decides and counts.
        scheduler: asked for the pipeline's scheduler, or None, at every forward.
    """

    def __init__(self, handle: Handle, scheduler: Callable[[], Any]) -> None:
        self.handle, self.scheduler = handle, scheduler
        self.run = Current[Run | None](None)
        # What a timestep of the model counts where no schedule tells: 1 or a thousand, once one has shown it.
        self.unit: int | None = None
        # Of a forward that is traced: its frames, rows and columns, [3] int64, or nothing, [0].
        self.traced: list[Tensor] = []
        # A `VideoTiles` that came without a grid.
        self.tiles: VideoTiles | None = None
        self.mode = SparseSDPA(self.attention)
        self.is_shown = False  # calls of the dispatch

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
        run = self.run.get()
        return dense() if run is None else self._aside(run, lambda: self._attend(run, call, dense))

    def _aside(self, run: Run, compute: Callable[[], Tensor]) -> Tensor:
        """Compute a call of the processor that runs, of which nothing is another call of it."""
        former = watcher.get()
        self.run.set(None)
        watcher.set(None)
        try:
            if torch.compiler.is_compiling() or _modes()[-1:] != [self.mode]:
                return compute()
            with _pop_mode_temporarily():
                return compute()
        finally:
            self.run.set(run)
            watcher.set(former)

    def _attend(self, run: Run, call: SdpaCall, dense: Callable[[], Tensor]) -> Tensor:
        is_cross, refusal = run.is_cross(call.query.shape[-2], call.key.shape[-2]), None
        if is_cross is None and self.handle.policy.only_self_attention:
            refusal = FEWER if run.layer is not None else UNKNOWN
        if torch.compiler.is_compiling():
            told = [] if run.layer is None else [run.layer, *self.traced]
            return self.handle.sdpa(call, dense, is_cross=is_cross, refusal=refusal, told=told)
        run.arrived.append(True)
        layer = None if run.layer is None else int(run.layer)
        return self.handle.sdpa(call, dense, layer=layer, is_cross=is_cross, refusal=refusal)

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

    def named(self, dispatch: Any) -> Callable[..., Tensor]:
        """A function for diffusers' registry: every call of it comes to the handle, without a layer."""
        names = dispatch.AttentionBackendName

        def backend(
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
            call = SdpaCall(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
            native = dispatch._AttentionBackendRegistry._backends[names.NATIVE]
            self.run.set(Run(None, None, False, []))
            try:
                return self.dispatched(native, **_by_name(call), _parallel_config=_parallel_config)
            finally:
                self.run.set(None)

        return backend

    def dispatched(self, dense: Callable[..., Tensor], **given: Any) -> Tensor:
        """A call of diffusers' dispatch; query [B, N, H, D], key and value [B, M, G, D], to [B, N, H, D].

        Args:
            dense: the backend that would compute it. given: its arguments by name.
        """
        run, parallel = self.run.get(), given.get("_parallel_config")
        if run is None:
            return dense(**given)
        refuse_ring(parallel)
        call = SdpaCall(**{name: given[name] for name in SdpaCall._fields if name in given})
        refusal = _unknown(given)
        if refusal is None and parallel is not None and needs_gradients(*call[:3]):
            refusal = GRADIENTS
        if refusal is not None:
            run.arrived.append(True)
            self.handle.count_dense(None if run.layer is None else int(run.layer), refusal)
            return self._aside(run, lambda: dense(**given))
        # A backend is given what it knows.
        local = functools.partial(self._local, functools.partial(_with_names, dense, tuple(given)))
        if parallel is None:
            return local(None, *call)
        gathered: Tensor = find_dispatch()._templated_context_parallel_attention(
            *call, False, forward_op=local, backward_op=_no_backward, _parallel_config=parallel
        )
        return gathered

    def _local(
        self,
        dense: Callable[[SdpaCall], Tensor],
        context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *options: Any,
        **_: Any,
    ) -> Tensor:
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
            lambda: rearrange(dense(call), "b n h d -> b h n d"),
        )
        return rearrange(out, "b h n d -> b n h d").contiguous()


def _with_names(function: Callable[..., Tensor], names: tuple[str, ...], call: SdpaCall) -> Tensor:
    return function(**{name: value for name, value in _by_name(call).items() if name in names})


def _by_name(call: SdpaCall) -> dict[str, Any]:  # `_asdict`, which torch 2.6 does not compile
    return {name: getattr(call, name) for name in SdpaCall._fields}


def _unknown(given: dict[str, Any]) -> str | None:
    """What only the backend of a call can read in its arguments, or None."""
    mask = given.get("attn_mask")
    if not isinstance(mask, Tensor | None):
        return f"a {type(mask).__name__} for a mask, which only its backend reads"
    others = given.keys() - {*SdpaCall._fields, "_parallel_config"}
    named = sorted(name for name in others if given[name] is not None and given[name] is not False)
    return f"options of its backend, {', '.join(named)}" if named else None


def refuse_ring(parallel_config: Any) -> None:
    """A ValueError for diffusers' ring attention."""
    config = getattr(parallel_config, "context_parallel_config", None)
    degree = 1 if config is None else config.ring_degree
    if degree > 1:
        raise ValueError(
            "ring_degree must be 1: blocks are selected from all keys of a head, which no process of a ring has; "
            f"use ulysses_degree, got ring_degree={degree}"
        )


def _no_backward(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("sparse attention has no gradient: call the model under torch.no_grad()")


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
