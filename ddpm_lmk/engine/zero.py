"""ZeRO stages 1 and 2: DeepSpeed shares out the optimizer's state, and with stage 2 the reduced gradient.

DeepSpeed is told as little as possible. Precision, the scale of fp16, clipping and leaving out of updates stay the
engine's, so that they mean the same as without it: weights are fp32, its clipping is off (its default is not), and a
global batch ends where the loop says. Sums are in its own order, so the class is `ordered`.

Checkpoints do not know of it: weights are whole on every rank, and moments are gathered and shared out by parameter,
so a run moves between stages and between numbers of processes. A parameter that no backward pass of any rank has
come to has a gradient of zero here and none elsewhere, so that weight decay would act on it: it is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ddpm_lmk.config import ClipConfig
from ddpm_lmk.engine.gradients import Updater
from ddpm_lmk.engine.optim import clip, moments
from ddpm_lmk.engine.training_state import TrainState

if TYPE_CHECKING:
    from ddpm_lmk.engine.parallel import Parallel

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroUpdater(Updater):
    """A model inside a DeepSpeed engine.

    Args:
        autocast: the precision of the run, entered inside DeepSpeed's forward pass, which leaves the one around it.
    """

    def __init__(
        self, state: TrainState, parallel: Parallel, *, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        super().__init__(state, parallel)
        # Before `shard`, which replaces the parameters in the optimizer by its flat parts.
        saved = moments(state.optimizer, state.model)
        with torch.no_grad():
            for parameter in state.model.parameters():  # it flattens them, and refuses channels-last ones
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        self._engine = parallel.shard(Inside(state.model, autocast), state.optimizer)
        self.net = self._engine
        self._flat: list[Tensor] = [group["params"][0] for group in state.optimizer.param_groups]
        self._has_moments = "betas" in state.optimizer.defaults
        self._trained = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
        self._reached: set[int] = set()  # numbers of those a backward pass of this group has come to on this rank
        self._unreached: list[nn.Parameter] = []  # by any rank
        marks = [lambda _, number=number: self._reached.add(number) for number in range(len(self._trained))]
        self._hooks = [parameter.register_hook(mark) for parameter, mark in zip(self._trained, marks)]
        self._take_over(saved)

    def _during(self, number: int, of: int) -> AbstractContextManager[Any]:
        """Only the last micro-batch of a group ends DeepSpeed's accumulation."""
        self._engine.set_gradient_accumulation_boundary(is_boundary=number == of - 1)
        return nullcontext()

    def apply(self, cfg: ClipConfig | None) -> None:
        """Clip this rank's part of the gradient by the norm of the whole, and update the weights."""
        clip(cfg, self._parts(), self._norm)
        # AdamW would decay a parameter whose gradient is zero because no pass has reached it.
        before = [parameter.detach().clone() for parameter in self._unreached]
        self._engine.step()
        with torch.no_grad():
            for parameter, value in zip(self._unreached, before):
                parameter.copy_(value)
                self._parallel.set_whole(parameter, value)

    def clear(self) -> None:
        """Forget the gradient, in the way DeepSpeed itself leaves out an update: one whose norm is not finite."""
        if unused := self._parts():
            # There is no other way to have it drop a gradient without an update.
            torch._foreach_mul_(unused, torch.nan)
            self._engine.step()
        self._reached.clear()
        self._loss.zero_()

    def moments(self) -> Mapping[str, Tensor]:
        """Optimizer state by parameter name, gathered from all ranks."""
        found: dict[str, Tensor] = {}
        if self._has_moments:
            states = self._state.optimizer.state
            steps = {id(parameter): states[flat]["step"] for flat, group in self._groups() for parameter in group}
            for name, parameter in self._state.model.named_parameters():
                if not parameter.requires_grad:
                    continue
                found |= {f"{key}/{name}": self._parallel.whole(parameter, key) for key in MOMENTS}
                found[f"step/{name}"] = steps[id(parameter)].clone()
        return found

    def reload(self) -> None:
        """Take over weights and moments that were put into the state from outside."""
        self._take_over(moments(self._state.optimizer, self._state.model))

    def close(self) -> None:
        """Take all hooks off the parameters, so that another run can use the model."""
        for hook in self._hooks:
            hook.remove()
        self._engine.destroy()

    def _take_over(self, saved: Mapping[str, Tensor]) -> None:
        """Share out whole weights and moments; the optimizer's state is then keyed by this rank's flat parts."""
        state, names = self._state.optimizer.state, {id(p): name for name, p in self._state.model.named_parameters()}
        state.clear()
        for parameter in self._trained:
            self._parallel.set_whole(parameter, parameter.detach())
        if not self._has_moments:
            return
        for flat, group in self._groups():
            steps = [saved[f"step/{names[id(p)]}"] for p in group if f"step/{names[id(p)]}" in saved]
            # DeepSpeed keeps one step for a group, AdamW one for a parameter; those of a group are equal.
            step = max(steps, default=torch.zeros(())).to(flat.device, copy=True)
            state[flat] = {"step": step, **{key: torch.zeros_like(flat) for key in MOMENTS}}
        # Left to itself it links the state of all groups after the first update of the first group, when the others
        # have none yet, and then finds none for ever.
        self._engine.optimizer._hp_optimizer_states_linked = False
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        for parameter in self._trained:
            for key in MOMENTS:
                value = saved.get(f"{key}/{names[id(parameter)]}")
                if value is not None:
                    self._parallel.set_whole(parameter, value.contiguous(), key)

    def _groups(self) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
        """The flat part this rank has of each group, and the parameters of the group."""
        return zip(self._flat, self._engine.optimizer.bit16_groups, strict=True)

    def _backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * self._parallel.world, scale_wrt_gas=False)  # it averages over ranks

    def _reduce(self) -> list[Tensor]:
        mine = torch.tensor([float(n in self._reached) for n in range(len(self._trained))], device=self._loss.device)
        self._unreached = [p for p, count in zip(self._trained, self._parallel.sum(mine)) if not count]
        return self._unscaled(self._parts())

    def _norm_of(self, grads: list[Tensor]) -> Tensor:
        norm = self._engine.optimizer.scaled_global_norm()
        return torch.where(norm < 0, torch.inf, norm)  # it says -1 where the norm is not finite

    def _parts(self) -> list[Tensor]:
        """The part this rank has of the reduced gradient; nothing once it was used."""
        return [part for grads in self._engine.optimizer.averaged_gradients.values() for part in grads or ()]


class Inside(nn.Module):
    """A model that enters its own precision: DeepSpeed's forward pass switches off an autocast around it."""

    def __init__(self, model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.model, self._autocast = model, autocast

    def forward(self, *arguments: Any) -> Any:
        """What the model says, in the precision of the run."""
        with self._autocast():
            return self.model(*arguments)
