"""A network in training: its optimiser, gradient scaler and weight average, a step of them, what resuming needs."""

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .networks import Network


class Training:
    """What a step of training changes. Observers and students are trained through it."""

    def __init__(
        self,
        network: Network,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        dtype: torch.dtype,
        *,
        decay: float,
        average_buffers: bool,
    ):
        """Args: network: on `device`. dtype: of the arithmetic, by autocast. decay: of the weight average, 0: there
        is none. average_buffers: BatchNorm statistics are averaged too; otherwise the live ones are copied."""
        self.network, self.optimizer, self.device, self.dtype = network, optimizer, device, dtype
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.average = ModelEmaV3(network, decay, exclude_buffers=not average_buffers) if decay else None

    def autocast(self) -> torch.autocast:
        """The arithmetic of forward passes."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def descend(self, loss: Tensor) -> None:
        """One step of the optimiser down the gradient of `loss` (a scalar), then of the average."""
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self.average.update(self.network)

    def state(self) -> dict[str, Tensor]:
        """Everything that the following steps depend on."""
        state = {f"live/{key}": value for key, value in self.network.state_dict().items()}
        if self.average:
            state |= {f"ema/{key}": value for key, value in self.average.module.state_dict().items()}
        for index, parameter in enumerate(self._parameters()):
            held = self.optimizer.state[parameter]
            state |= {f"optimizer/{index}/{key}": value for key, value in held.items() if value is not None}
        scale = {f"scaler/{k}": torch.tensor(v, dtype=torch.float64) for k, v in self.scaler.state_dict().items()}
        return state | scale

    def restore(self, state: dict[str, Tensor]) -> None:
        """Puts a saved state back; keys that are not of `state()` are passed over."""
        self.network.load_state_dict(part(state, "live/"))
        if self.average:
            self.average.module.load_state_dict(part(state, "ema/"))
        for index, parameter in enumerate(self._parameters()):
            for key, value in part(state, f"optimizer/{index}/").items():
                like = parameter if value.shape == parameter.shape else value.to(parameter.device)
                self.optimizer.state[parameter][key] = torch.empty_like(like, dtype=value.dtype).copy_(value)
        if scale := part(state, "scaler/"):
            counts = ("growth_interval", "_growth_tracker")
            self.scaler.load_state_dict({k: int(v) if k in counts else float(v) for k, v in scale.items()})

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of `state` under `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
