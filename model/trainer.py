"""Hold both networks with their optimisers, train them one step at a time, save and restore their state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import compress
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ixi_etl.errors import CheckpointError
from model import checkpoint
from model.config import TrainConfig
from model.cpu_layers import channels_last_view, logical_view
from model.cuda_graph import CudaGraphStep
from model.generator import build_generator, with_prefix
from model.networks import PatchDiscriminator, UNetGenerator, discriminator_loss, generator_loss, pad, to_device

LOSSES = ("loss_d", "loss_d_real", "loss_d_fake", "loss_g", "loss_g_adversarial", "loss_g_reconstruction")


class Trainer:
    """Networks and optimisers of a resolved configuration, on one device.

    Under `torchrun` both networks average their gradients over all processes.

    Attributes:
        networks: `generator` and, unless `adversarial` is `none`, `discriminator`.
        optimisers: an Adam for each of them.
        average: the moving average of the generator; None if `ema` is 0.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        torch.manual_seed(config.seed)  # equal weights in all processes
        self.generator = to_device(build_generator(config), device)
        self.discriminator: PatchDiscriminator | None = None
        if config.adversarial != "none":
            discriminator = PatchDiscriminator(
                config.discriminator_width, config.discriminator_layers, config.norm, config.input_channels
            )
            self.discriminator = to_device(discriminator, device)
        torch.manual_seed(config.seed + self.rank)  # different dropout in each
        both = {"generator": self.generator, "discriminator": self.discriminator}
        self.networks: dict[str, nn.Module] = {k: network for k, network in both.items() if network is not None}
        self._lr_ratios = {"generator": 1.0, "discriminator": (config.lr_discriminator or config.lr) / config.lr}
        self.optimisers = {name: self._adam(network) for name, network in self.networks.items()}
        self.average: AveragedModel | None = None
        self._ema_initialised = False  # the first step copies the generator
        self._ema_update = get_ema_multi_avg_fn(config.ema)
        if config.ema:
            self.average = AveragedModel(self.generator, multi_avg_fn=self._ema_update, use_buffers=True)
        self._parallel_generator = self._parallel(self.generator)
        self._parallel_discriminator = None if self.discriminator is None else self._parallel(self.discriminator)
        self._lr: float | None = None  # the generator's current learning rate
        self._step_fn = self._make_step_fn()

    @property
    def _uses_cuda_graph(self) -> bool:
        """Not under `torchrun`, where processes wait for each other's gradients."""
        return self.config.cuda_graphs and self.device.type == "cuda" and not distributed.is_initialized()

    def _make_step_fn(self) -> Callable[[Tensor, Tensor], Tensor]:
        return CudaGraphStep(self._train_step) if self._uses_cuda_graph else self._train_step

    def _adam(self, network: nn.Module) -> Adam:
        # A CUDA graph would fix a Python number at capture, so the learning rate is a tensor there.
        lr = torch.tensor(self.config.lr, device=self.device) if self._uses_cuda_graph else self.config.lr
        weights = [channels_last_view(p) for p in network.parameters()]
        return Adam(weights, lr, self.config.betas, fused=True, capturable=self._uses_cuda_graph)

    def _parallel(self, network: nn.Module) -> nn.Module:
        if not distributed.is_initialized():
            return network
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=ids)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute the block in the precision of the configuration."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            yield

    def step(self, source: Tensor, target: Tensor, lr: float) -> Tensor:
        """Train on one batch in [-1, 1]; return the losses (6,), in the order of `LOSSES`.

        `source` is (B, C, H, W), `target` (B, 1, H, W); both are padded to the sizes that the generator takes. `lr` is
        the generator's; the discriminator's is proportional to it.
        """
        if lr != self._lr:
            self._set_lr(lr)
        source, target = (pad(images, self.generator.multiple) for images in (source, target))
        source = source.contiguous(memory_format=torch.channels_last)
        target = target.contiguous(memory_format=torch.channels_last)
        if not self.generator.training:
            self.generator.train()
        losses = self._step_fn(source, target)
        if self.average is not None:
            self._update_ema(self.average)
        return losses

    def _set_lr(self, lr: float) -> None:
        for name, optimiser in self.optimisers.items():
            own = lr * self._lr_ratios[name]
            for group in optimiser.param_groups:
                if self._uses_cuda_graph:
                    group["lr"].fill_(own)
                else:
                    group["lr"] = own
        self._lr = lr

    def _train_step(self, source: Tensor, target: Tensor) -> Tensor:
        """Update both networks. This is captured as a CUDA graph, so nothing in it may read a value from the GPU."""
        with self.autocast():
            generated = self._parallel_generator(source)
        zero = torch.zeros((), device=self.device)
        losses = [zero, zero, zero]
        if self._parallel_discriminator is not None:
            with self.autocast():
                real, fake = self._score_pairs(self._parallel_discriminator, source, target, generated.detach())
            d_loss = discriminator_loss(self.config, real, fake)
            self._backward_and_step("discriminator", d_loss.total)
            losses = [part.detach() for part in d_loss]
        logits = None
        with _frozen(self.discriminator):  # its gradients of the generator's loss are not needed
            if self.discriminator is not None:
                with self.autocast():
                    logits = self.discriminator(source, generated)
            g_loss = generator_loss(self.config, logits, generated, target)
            self._backward_and_step("generator", g_loss.total)
        return torch.stack([*losses, *(part.detach() for part in g_loss)])

    def _score_pairs(
        self, discriminator: nn.Module, source: Tensor, target: Tensor, generated: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The discriminator's logits of the real pairs and of the generated ones, in one pass where that is exact."""
        if self.config.norm == "batch":  # its statistics would mix real and generated pairs
            return discriminator(source, target), discriminator(source, generated)
        both: Tensor = discriminator(torch.cat([source, source]), torch.cat([target, generated]))
        real, fake = both.chunk(2)
        return real, fake

    def _backward_and_step(self, name: str, loss: Tensor) -> None:
        network, optimiser = self.networks[name], self.optimisers[name]
        optimiser.zero_grad(set_to_none=True)  # its parameters are views, with gradients of their own
        network.zero_grad(set_to_none=True)
        loss.backward()
        for weight, view in zip(network.parameters(), optimiser.param_groups[0]["params"], strict=True):
            view.grad = None if weight.grad is None else channels_last_view(weight.grad)
        optimiser.step()

    def _update_ema(self, average: AveragedModel) -> None:
        """Do what `AveragedModel.update_parameters` does, without its copy of a count to the GPU, which blocks."""
        if not self._ema_initialised:
            average.update_parameters(self.generator)
            self._ema_initialised = True
            return
        averaged, current = ([*n.parameters(), *n.buffers()] for n in (average.module, self.generator))
        for dtype in {tensor.dtype for tensor in averaged}:  # one call for all tensors of a type
            chosen = [tensor.dtype == dtype for tensor in averaged]
            self._ema_update(list(compress(averaged, chosen)), list(compress(current, chosen)), average.n_averaged)
        average.n_averaged += 1

    @property
    def ema_or_current(self) -> UNetGenerator:
        """The generator to validate, sample and keep: the moving average if there is one, otherwise the current."""
        network = self.generator if self.average is None else self.average.module
        assert isinstance(network, UNetGenerator)
        return network

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next step depends on. Collective: under `torchrun` every process must call it."""
        state = self._weights()
        for name, optimiser in self.optimisers.items():
            for number, values in optimiser.state_dict()["state"].items():
                state |= {f"{name}_optimizer.{number}.{k}": logical_view(v) for k, v in values.items()}
        return state | self._random_states()

    def _weights(self) -> dict[str, Tensor]:
        """Weights of the networks and of the moving average."""
        networks = self.networks | ({} if self.average is None else {"average": self.average})
        return {f"{name}.{k}": v for name, network in networks.items() for k, v in network.state_dict().items()}

    def _random_states(self) -> dict[str, Tensor]:
        """Random states of all processes."""
        own = {f"random.cpu.{self.rank}": torch.get_rng_state()}
        if self.device.type == "cuda":
            own[f"random.cuda.{self.rank}"] = torch.cuda.get_rng_state(self.device)
        if not distributed.is_initialized():
            return own
        gathered: list[dict[str, Tensor]] = [{}] * distributed.get_world_size()
        distributed.all_gather_object(gathered, own)
        return {name: state for states in gathered for name, state in states.items()}

    def load_state_dict(self, state: dict[str, Tensor], path: Path) -> None:
        """Restore a state of `state_dict`, read from the file `path`.

        Raises:
            CheckpointError: the state does not fit this trainer's configuration; the message names `path`.
        """
        checkpoint.require_tensors(path, state, self._expected_state(state))
        for name, network in self.networks.items():
            network.load_state_dict(with_prefix(state, name))
            moments: dict[int, dict[str, Tensor]] = {}
            for key, value in with_prefix(state, f"{name}_optimizer").items():
                number, moment = key.split(".")
                moments.setdefault(int(number), {})[moment] = value
            for values in moments.values():
                for moment in ("exp_avg", "exp_avg_sq"):
                    values[moment] = channels_last_view(values[moment]).contiguous()
            groups = self.optimisers[name].state_dict()["param_groups"]
            self.optimisers[name].load_state_dict({"state": moments, "param_groups": groups})
        if self.average is not None:
            self.average.load_state_dict(with_prefix(state, "average"))
            self._ema_initialised = bool(self.average.n_averaged)
        try:
            if f"random.cpu.{self.rank}" in state:
                torch.set_rng_state(state[f"random.cpu.{self.rank}"])
            if self.device.type == "cuda" and f"random.cuda.{self.rank}" in state:
                torch.cuda.set_rng_state(state[f"random.cuda.{self.rank}"], self.device)
        except (RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{path} has an invalid random state ({reason}); remove the file") from error
        self._lr = None
        self._step_fn = self._make_step_fn()  # a captured graph refers to the tensors of the old state

    def _expected_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors with the names, shapes and types that a state of this trainer must have.

        Before its first step a trainer has no moments. The number of random states is that of `state`.
        """
        wanted = self._weights() | {name: t for name, t in state.items() if name.startswith("random.")}
        for name, network in self.networks.items():
            moments = f"{name}_optimizer"
            for number, weight in enumerate(network.parameters() if with_prefix(state, moments) else ()):
                wanted |= {f"{moments}.{number}.{moment}": weight for moment in ("exp_avg", "exp_avg_sq")}
                wanted[f"{moments}.{number}.step"] = torch.zeros(())
        return wanted


@contextmanager
def _frozen(network: nn.Module | None) -> Iterator[None]:
    """Compute no gradients of the network's weights in the block."""
    if network is None:
        yield
        return
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
