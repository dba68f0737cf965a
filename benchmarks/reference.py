"""The reference implementation's networks and training step, written out to be measured beside ours.

After junyanz/pytorch-CycleGAN-and-pix2pix (Copyright (c) 2017, Jun-Yan Zhu and Taesung Park; BSD 2-clause licence):
`UnetGenerator` with 8 levels and dropout, `NLayerDiscriminator`, `GANLoss` in mode `vanilla`, normal initialisation,
and `Pix2PixModel.optimize_parameters`, in float32 and channels first, with the options that `train.py --model pix2pix`
sets, but for one channel in and out. Left out is what takes no part in a step: options, schedulers, display, saving.
Dropout stands one level further out there than in the publication, and here in `model.networks`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]

BATCH_NORM: NormLayer = functools.partial(nn.BatchNorm2d, affine=True, track_running_stats=True)
"""What pix2pix is trained with there."""

INSTANCE_NORM: NormLayer = functools.partial(nn.InstanceNorm2d, affine=True)
"""Ours: at batch size 1 the same function, at others the one that treats each image alone."""


def has_bias(norm_layer: NormLayer) -> bool:
    return isinstance(norm_layer, functools.partial) and norm_layer.func is nn.InstanceNorm2d


class UnetSkipConnectionBlock(nn.Module):
    """X -------------------identity----------------------; |-- downsampling -- submodule -- upsampling --|."""

    def __init__(
        self,
        outer_nc: int,
        inner_nc: int,
        norm_layer: NormLayer,
        input_nc: int | None = None,
        submodule: nn.Module | None = None,
        outermost: bool = False,
        innermost: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.outermost = outermost
        use_bias = has_bias(norm_layer)
        downconv = nn.Conv2d(input_nc or outer_nc, inner_nc, kernel_size=4, stride=2, padding=1, bias=use_bias)
        downrelu = nn.LeakyReLU(0.2, True)
        uprelu = nn.ReLU(True)
        if outermost:
            upconv = nn.ConvTranspose2d(inner_nc * 2, outer_nc, kernel_size=4, stride=2, padding=1)
            model = [downconv, submodule, uprelu, upconv, nn.Tanh()]
        elif innermost:
            upconv = nn.ConvTranspose2d(inner_nc, outer_nc, kernel_size=4, stride=2, padding=1, bias=use_bias)
            model = [downrelu, downconv, uprelu, upconv, norm_layer(outer_nc)]
        else:
            upconv = nn.ConvTranspose2d(inner_nc * 2, outer_nc, kernel_size=4, stride=2, padding=1, bias=use_bias)
            model = [downrelu, downconv, norm_layer(inner_nc), submodule, uprelu, upconv, norm_layer(outer_nc)]
            model += [nn.Dropout(dropout)] if dropout else []
        self.model = nn.Sequential(*[part for part in model if part is not None])

    def forward(self, x: Tensor) -> Tensor:
        inside: Tensor = self.model(x)
        return inside if self.outermost else torch.cat([x, inside], 1)


class UnetGenerator(nn.Module):
    def __init__(
        self,
        input_nc: int = 1,
        output_nc: int = 1,
        num_downs: int = 8,
        ngf: int = 64,
        norm_layer: NormLayer = BATCH_NORM,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        block = UnetSkipConnectionBlock(ngf * 8, ngf * 8, norm_layer, innermost=True)
        for _ in range(num_downs - 5):
            block = UnetSkipConnectionBlock(ngf * 8, ngf * 8, norm_layer, submodule=block, dropout=dropout)
        block = UnetSkipConnectionBlock(ngf * 4, ngf * 8, norm_layer, submodule=block)
        block = UnetSkipConnectionBlock(ngf * 2, ngf * 4, norm_layer, submodule=block)
        block = UnetSkipConnectionBlock(ngf, ngf * 2, norm_layer, submodule=block)
        self.model = UnetSkipConnectionBlock(output_nc, ngf, norm_layer, input_nc, block, outermost=True)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.model(x)
        return made


class NLayerDiscriminator(nn.Module):
    def __init__(self, input_nc: int = 2, ndf: int = 64, n_layers: int = 3, norm_layer: NormLayer = BATCH_NORM) -> None:
        super().__init__()
        use_bias = has_bias(norm_layer)
        sequence: list[nn.Module] = [nn.Conv2d(input_nc, ndf, kernel_size=4, stride=2, padding=1)]
        sequence += [nn.LeakyReLU(0.2, True)]
        for n in range(1, n_layers + 1):
            before, after, stride = ndf * min(2 ** (n - 1), 8), ndf * min(2**n, 8), 1 if n == n_layers else 2
            sequence += [nn.Conv2d(before, after, kernel_size=4, stride=stride, padding=1, bias=use_bias)]
            sequence += [norm_layer(after), nn.LeakyReLU(0.2, True)]
        sequence += [nn.Conv2d(ndf * min(2**n_layers, 8), 1, kernel_size=4, stride=1, padding=1)]
        self.model = nn.Sequential(*sequence)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.model(x)
        return scores


def init_weights(module: nn.Module) -> None:
    """`--init_type normal`."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class GANLoss(nn.Module):
    """Mode `vanilla`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("real_label", torch.tensor(1.0))
        self.register_buffer("fake_label", torch.tensor(0.0))
        self.loss = nn.BCEWithLogitsLoss()

    def __call__(self, prediction: Tensor, target_is_real: bool) -> Tensor:
        target = self.real_label if target_is_real else self.fake_label
        loss: Tensor = self.loss(prediction, target.expand_as(prediction))
        return loss


class Pix2PixModel:
    """`real_A` is the source, `real_B` the target, (B, 1, H, W) in [-1, 1]."""

    def __init__(
        self,
        norm_layer: NormLayer = BATCH_NORM,
        num_downs: int = 8,
        width: int = 64,
        dropout: float = 0.5,
        lambda_l1: float = 100.0,
        device: str = "cpu",
    ) -> None:
        self.netG = UnetGenerator(1, 1, num_downs, width, norm_layer, dropout).to(device)
        self.netD = NLayerDiscriminator(2, width, 3, norm_layer).to(device)
        self.netG.apply(init_weights)
        self.netD.apply(init_weights)
        self.lambda_L1 = lambda_l1
        self.criterionGAN = GANLoss().to(device)
        self.criterionL1 = nn.L1Loss()
        self.optimizer_G = torch.optim.Adam(self.netG.parameters(), lr=0.0002, betas=(0.5, 0.999))
        self.optimizer_D = torch.optim.Adam(self.netD.parameters(), lr=0.0002, betas=(0.5, 0.999))

    def set_input(self, source: Tensor, target: Tensor) -> None:
        self.real_A, self.real_B = source, target

    def forward(self) -> None:
        self.fake_B = self.netG(self.real_A)

    def backward_D(self) -> None:  # noqa: N802
        fake_AB = torch.cat((self.real_A, self.fake_B), 1)  # noqa: N806
        pred_fake = self.netD(fake_AB.detach())
        self.loss_D_fake = self.criterionGAN(pred_fake, False)
        real_AB = torch.cat((self.real_A, self.real_B), 1)  # noqa: N806
        pred_real = self.netD(real_AB)
        self.loss_D_real = self.criterionGAN(pred_real, True)
        self.loss_D = (self.loss_D_fake + self.loss_D_real) * 0.5
        self.loss_D.backward()

    def backward_G(self) -> None:  # noqa: N802
        fake_AB = torch.cat((self.real_A, self.fake_B), 1)  # noqa: N806
        pred_fake = self.netD(fake_AB)
        self.loss_G_GAN = self.criterionGAN(pred_fake, True)
        self.loss_G_L1 = self.criterionL1(self.fake_B, self.real_B) * self.lambda_L1
        self.loss_G = self.loss_G_GAN + self.loss_G_L1
        self.loss_G.backward()

    def optimize_parameters(self) -> None:
        self.forward()
        set_requires_grad(self.netD, True)
        self.optimizer_D.zero_grad()
        self.backward_D()
        self.optimizer_D.step()
        set_requires_grad(self.netD, False)
        self.optimizer_G.zero_grad()
        self.backward_G()
        self.optimizer_G.step()


def set_requires_grad(network: nn.Module, requires_grad: bool) -> None:
    for param in network.parameters():
        param.requires_grad = requires_grad
