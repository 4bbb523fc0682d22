"""A bidirectional LSTM over packed tokens. Shape letters: see model/packed.py.

Each direction is a stack of its own, and a residue is predicted from the state of the one just
before it and of the other just behind it: whatever stands at its own place changes nothing. So the
input is clean (there is no `<mask>` and no random letter), and every residue is a target.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from raptide.model.lstm.config import LstmSettings
from raptide.model.lstm.order import Reading, read_both_ways
from raptide.model.packed import Packed, Targets


class Layer(nn.Module):
    """One layer of both directions, of which neither sees the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.onward = nn.LSTM(width // 2, width // 2)
        self.back = nn.LSTM(width // 2, width // 2)

    def forward(self, x_TD: torch.Tensor, onward: Reading, back: Reading) -> torch.Tensor:
        """States after each token, the residue's own included, [T, D]."""
        ahead, behind = x_TD.chunk(2, -1)
        return torch.cat([onward.run(self.onward, ahead), back.run(self.back, behind)], -1)


class Lstm(nn.Module):
    """Language model of proteins, both ways (the baseline of Rives et al., PNAS 2021)."""

    contact_head = None
    """There are no attention maps to read contacts off."""

    def __init__(self, settings: LstmSettings, *, with_head: bool = True) -> None:
        super().__init__()
        self.settings = settings
        self.has_head = with_head
        # In training: keep each layer's input alone and compute the rest again on the way back.
        self.checkpoint_activations = False
        vocabulary, width = len(settings.alphabet), settings.width
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(settings.layers))
        if with_head:
            self.head_weight = nn.Parameter(torch.empty(vocabulary, width))
            self.head_bias = nn.Parameter(torch.zeros(vocabulary))

    @torch.no_grad()
    def initialise(self, seed: int) -> Lstm:
        """Draw fresh weights, as torch does; what is remembered at first stays; returns self.

        The bias of the forget gates is 1 (Jozefowicz et al., ICML 2015), all others are 0.
        """
        generator = torch.Generator().manual_seed(seed)
        half = self.settings.width // 2
        bound = 1 / math.sqrt(half)
        for name, parameter in self.named_parameters():
            if "bias" in name:
                parameter.zero_()
                if "bias_ih" in name:  # input, forget, cell and output gates, in torch's order
                    parameter[half : 2 * half] = 1.0
            elif name == "embed.weight":
                parameter.normal_(0.0, 1.0, generator=generator)
            else:
                parameter.uniform_(-bound, bound, generator=generator)
        return self

    def forward(self, packed: Packed, targets: Targets | None = None) -> torch.Tensor:
        """Logits [T, V]; with `targets` the loss at each, [N] fp32, in nats."""
        (final_TD,) = self.represent(packed, [self.settings.layers])
        around_TD = around(final_TD, packed)
        if targets is None:
            return self._predict(around_TD)
        logits = self._predict(around_TD.index_select(0, targets.at_N)).float()
        return cross_entropy(logits, targets.true_N, reduction="none")

    def represent(self, packed: Packed, layers: Iterable[int]) -> list[torch.Tensor]:
        """Representations [T, D] after the given layers, in their order; 0 is the embedding.

        One of a residue has seen that residue too: what is blind are the logits alone.
        """
        wanted = list(layers)
        ways = read_both_ways(packed)
        x_TD = self.embed(packed.tokens_T)
        kept = {0: x_TD}
        for index in range(1, max(wanted) + 1):
            x_TD = self._run_layer(self.layers[index - 1], x_TD, *ways)
            kept[index] = x_TD
        return [kept[index] for index in wanted]

    def _run_layer(self, layer: nn.Module, *inputs: object) -> torch.Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def _predict(self, around_ND: torch.Tensor) -> torch.Tensor:
        assert self.has_head
        return linear(around_ND, self.head_weight, self.head_bias)

    @property
    def letters(self) -> torch.Tensor:
        """The output's row of each token, [V, D]."""
        return self.head_weight

    def compile_layers(self) -> None:
        """There is nothing to fuse: a layer is one kernel a direction already."""

    def frequencies(self) -> None:
        """There are no rotary positions."""
        return None


def around(final_TD: torch.Tensor, packed: Packed) -> torch.Tensor:
    """What each token is predicted from, [T, D]: its neighbours' states, zeros beyond the ends."""
    onward, back = final_TD.chunk(2, -1)
    first_T = packed.position_T == 0
    before = onward.roll(1, 0).masked_fill(first_T[:, None], 0.0)
    behind = back.roll(-1, 0).masked_fill(first_T.roll(-1, 0)[:, None], 0.0)
    return torch.cat([before, behind], -1)
