"""A network in training: its optimiser, gradient scaler and weight average, a step of them, what resuming needs."""

from collections.abc import Callable

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .networks import Network
from .recorded import Recorded


class Training:
    """What a step of training changes. Observers and students are trained through it."""

    def __init__(
        self,
        network: Network,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        dtype: torch.dtype,
        loss: Callable[..., Tensor],
        *,
        decay: float,
        average_buffers: bool,
    ):
        """Args: network: on `device`. dtype: of the arithmetic, by autocast. loss: of a batch's tensors, a scalar.
        decay: of the weight average, 0: there is none. average_buffers: BatchNorm statistics are averaged too;
        otherwise the live ones are copied."""
        self.network, self.optimizer, self.device, self.dtype, self.loss = network, optimizer, device, dtype, loss
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.average = ModelEmaV3(network, decay, exclude_buffers=not average_buffers) if decay else None
        if device.type == "cuda":  # as a recorded step needs them
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"], device=device)
                group |= {"capturable": True} if "capturable" in group else {}
        # the scaler looks at its gradients from Python
        self.descend = Recorded(self._descend, device, enabled=not self.scaler.is_enabled())

    def autocast(self) -> torch.autocast:
        """The arithmetic of forward passes."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def rate(self, lr: float) -> None:
        """Sets the learning rate of the following steps."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def _descend(self, *batch: Tensor | None) -> Tensor:
        """One step of the optimiser down the gradient of a batch's loss, then of the average; the loss before it."""
        self.optimizer.zero_grad()
        loss = self.loss(*batch)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self.average.update(self.network)
        return loss.detach()

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
