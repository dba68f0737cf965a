"""What learns: both networks with their optimisers, one step of pix2pix, and all of it as tensors and back."""

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

from model import checkpoint
from model.checkpoint import CheckpointError
from model.config import TrainConfig
from model.cpu import as_it_is_shaped, as_it_lies
from model.graph import GraphedStep
from model.losses import discriminator_loss, generator_loss
from model.networks import PatchDiscriminator, UNetGenerator, place

LOSSES = ("loss_d", "loss_d_real", "loss_d_fake", "loss_g", "loss_g_adversarial", "loss_g_reconstruction")


class Learner:
    """Networks and optimisers of a resolved configuration, on one device.

    Under `torchrun` both networks average their gradients over all processes.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        torch.manual_seed(config.seed)  # the same weights everywhere
        self.generator = place(build_generator(config), device)
        self.discriminator: PatchDiscriminator | None = None
        if config.adversarial != "none":
            discriminator = PatchDiscriminator(config.discriminator_width, config.discriminator_layers, config.norm)
            self.discriminator = place(discriminator, device)
        torch.manual_seed(config.seed + self.rank)  # but dropout of its own in each process
        self.optimizers = {name: self._adam(network) for name, network in self._networks().items()}
        self.average: AveragedModel | None = None
        self._follows = False  # it begins with the generator of the first step
        self._blend = get_ema_multi_avg_fn(config.ema)
        if config.ema:
            self.average = AveragedModel(self.generator, multi_avg_fn=self._blend, use_buffers=True)
        self._generate = self._parallel(self.generator)
        self._judge = None if self.discriminator is None else self._parallel(self.discriminator)
        self._lr: float | None = None  # that the optimisers have
        self._descent = self._new_descent()

    @property
    def _graphed(self) -> bool:
        """Under `torchrun` processes wait for each other's gradients, which is left to run as it is."""
        return self.config.cuda_graphs and self.device.type == "cuda" and not distributed.is_initialized()

    def _new_descent(self) -> Callable[[Tensor, Tensor], Tensor]:
        return GraphedStep(self._learn) if self._graphed else self._learn

    def _networks(self) -> dict[str, nn.Module]:
        both = {"generator": self.generator, "discriminator": self.discriminator}
        return {name: network for name, network in both.items() if network is not None}

    def _adam(self, network: nn.Module) -> Adam:
        # A graph has no numbers of Python's, so there the learning rate is a tensor.
        lr = torch.tensor(self.config.lr, device=self.device) if self._graphed else self.config.lr
        weights = [as_it_lies(p) for p in network.parameters()]
        return Adam(weights, lr, self.config.betas, fused=True, capturable=self._graphed)

    def _parallel(self, network: nn.Module) -> nn.Module:
        if not distributed.is_initialized():
            return network
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=ids)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            yield

    def step(self, source: Tensor, target: Tensor, lr: float) -> Tensor:
        """Learn from one batch (B, 1, H, W) in [-1, 1]; the losses, (6,) in the order of `LOSSES`."""
        if lr != self._lr:
            self._set_lr(lr)
        source = source.contiguous(memory_format=torch.channels_last)
        target = target.contiguous(memory_format=torch.channels_last)
        if not self.generator.training:
            self.generator.train()
        losses = self._descent(source, target)
        if self.average is not None:
            self._follow(self.average)
        return losses

    def _set_lr(self, lr: float) -> None:
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                if self._graphed:
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr
        self._lr = lr

    def _learn(self, source: Tensor, target: Tensor) -> Tensor:
        """One step of both networks. Nothing in here may ask the GPU for a number: it is recorded as a graph."""
        with self.autocast():
            generated = self._generate(source)
        zero = torch.zeros((), device=self.device)
        told = [zero, zero, zero]
        if self._judge is not None:
            with self.autocast():
                real, fake = self._judged(source, target, generated.detach())
            loss = discriminator_loss(self.config, real, fake)
            self._descend("discriminator", loss.total)
            told = [part.detach() for part in loss]
        logits = None
        with _frozen(self.discriminator):  # its gradients of the generator's loss would be thrown away
            if self.discriminator is not None:
                with self.autocast():
                    logits = self.discriminator(source, generated)
            missed = generator_loss(self.config, logits, generated, target)
            self._descend("generator", missed.total)
        return torch.stack([*told, *(part.detach() for part in missed)])

    def _judged(self, source: Tensor, target: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
        """The discriminator's logits of the real pairs and of the generated ones."""
        assert self._judge is not None
        if self.config.norm == "batch":  # whose statistics would mix the two
            return self._judge(source, target), self._judge(source, generated)
        both: Tensor = self._judge(torch.cat([source, source]), torch.cat([target, generated]))
        real, fake = both.chunk(2)
        return real, fake

    def _descend(self, name: str, loss: Tensor) -> None:
        self.optimizers[name].zero_grad(set_to_none=True)  # it holds the gradients too
        self._networks()[name].zero_grad(set_to_none=True)
        loss.backward()
        self.update(name)

    def update(self, name: str) -> None:
        """Step the optimiser of a network by the gradients that its weights have."""
        network, optimizer = self._networks()[name], self.optimizers[name]
        for weight, lying in zip(network.parameters(), optimizer.param_groups[0]["params"], strict=True):
            lying.grad = None if weight.grad is None else as_it_lies(weight.grad)
        optimizer.step()

    def _follow(self, average: AveragedModel) -> None:
        """What `update_parameters` does, which sends a count to the GPU each time and waits until that has it."""
        if not self._follows:
            average.update_parameters(self.generator)
            self._follows = True
            return
        mine, theirs = ([*n.parameters(), *n.buffers()] for n in (average.module, self.generator))
        for dtype in {tensor.dtype for tensor in mine}:  # one call for all of a kind
            of = [tensor.dtype == dtype for tensor in mine]
            self._blend(list(compress(mine, of)), list(compress(theirs, of)), average.n_averaged)
        average.n_averaged += 1

    @property
    def best_generator(self) -> UNetGenerator:
        """The one to use: the moving average, if there is one."""
        network = self.generator if self.average is None else self.average.module
        assert isinstance(network, UNetGenerator)
        return network

    # -- as tensors -----------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name. Under `torchrun` every process must call this."""
        state = self._weights()
        for name, optimizer in self.optimizers.items():
            for number, values in optimizer.state_dict()["state"].items():
                state |= {f"{name}_optimizer.{number}.{k}": as_it_is_shaped(v) for k, v in values.items()}
        return state | self._random_states()

    def _weights(self) -> dict[str, Tensor]:
        """Of the networks and the moving average."""
        networks = self._networks() | ({} if self.average is None else {"average": self.average})
        return {f"{name}.{k}": v for name, network in networks.items() for k, v in network.state_dict().items()}

    def _random_states(self) -> dict[str, Tensor]:
        mine = {f"random.cpu.{self.rank}": torch.get_rng_state()}
        if self.device.type == "cuda":
            mine[f"random.cuda.{self.rank}"] = torch.cuda.get_rng_state(self.device)
        if not distributed.is_initialized():
            return mine
        everybody: list[dict[str, Tensor]] = [{}] * distributed.get_world_size()
        distributed.all_gather_object(everybody, mine)
        return {name: state for theirs in everybody for name, state in theirs.items()}

    def restore(self, state: dict[str, Tensor], path: Path) -> None:
        """Take up the state that `tensors` gave, and that was read from `path`.

        Raises:
            CheckpointError: it is of another learner.
        """
        checkpoint.require(path, state, self._wanted(state))
        for name, network in self._networks().items():
            network.load_state_dict(_under(state, name))
            moments: dict[int, dict[str, Tensor]] = {}
            for key, value in _under(state, f"{name}_optimizer").items():
                number, what = key.split(".")
                moments.setdefault(int(number), {})[what] = value
            for values in moments.values():
                for what in ("exp_avg", "exp_avg_sq"):
                    values[what] = as_it_lies(values[what]).contiguous()
            groups = self.optimizers[name].state_dict()["param_groups"]
            self.optimizers[name].load_state_dict({"state": moments, "param_groups": groups})
        if self.average is not None:
            self.average.load_state_dict(_under(state, "average"))
            self._follows = bool(self.average.n_averaged)
        try:
            if f"random.cpu.{self.rank}" in state:
                torch.set_rng_state(state[f"random.cpu.{self.rank}"])
            if self.device.type == "cuda" and f"random.cuda.{self.rank}" in state:
                torch.cuda.set_rng_state(state[f"random.cuda.{self.rank}"], self.device)
        except (RuntimeError, TypeError) as error:
            said = str(error).splitlines()[0]
            raise CheckpointError(f"{path} has no random state that torch takes ({said}); remove it") from error
        self._lr = None
        self._descent = self._new_descent()  # what was recorded is of the tensors that were there before

    def _wanted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a state of this learner has, in tensors of the same shapes and types.

        One that has not taken a step has no moments; random states are those of however many processes there were.
        """
        wanted = self._weights() | {name: t for name, t in state.items() if name.startswith("random.")}
        for name, network in self._networks().items():
            moments = f"{name}_optimizer"
            for number, weight in enumerate(network.parameters() if _under(state, moments) else ()):
                wanted |= {f"{moments}.{number}.{what}": weight for what in ("exp_avg", "exp_avg_sq")}
                wanted[f"{moments}.{number}.step"] = torch.zeros(())
        return wanted


@contextmanager
def _frozen(network: nn.Module | None) -> Iterator[None]:
    """Nothing in the block makes gradients of the network's weights."""
    if network is None:
        yield
        return
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


def _under(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}


def build_generator(config: TrainConfig) -> UNetGenerator:
    """The generator of a resolved configuration, with fresh weights."""
    assert config.side is not None
    return UNetGenerator(config.side, config.width, config.dropout, config.upsampling, config.norm)


def generator_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights to generate with: of a learner's tensors the moving average, if there is one, or a generator's."""
    for name in ("average.module", "generator"):
        weights = _under(state, name)
        if weights:
            return weights
    return state
