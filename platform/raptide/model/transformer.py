"""The ESM transformer over packed tokens. Shape letters: see packed.py.

One class serves ESM-1, ESM-1b and ESM-2; `ModelSettings.traits` holds what differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu, linear, pad
from torch.utils.checkpoint import checkpoint

from raptide.model.attention import Extra, attend, attend_at_once, attention_maps
from raptide.model.config import ModelSettings
from raptide.model.contacts import ContactHead
from raptide.model.device import has_varlen_attention, token_chunks
from raptide.model.packed import Packed, Spans, Targets

FIRST_POSITION = 2
"""Position index of a sequence's first token: the padding index (1) plus one, as in fairseq."""

TRAINING_MASK_SHARE = 0.15 * 0.8
"""Share of tokens that are `<mask>` in pretraining; token dropout scales by it."""

ROTARY_BASE = 10000.0

Rotation = tuple[torch.Tensor, ...]
"""Cosine and sine of each token's rotary angles, [T, 1, K / 2] each; () for other positions."""


class Attention(nn.Module):
    """Multi-head self-attention within each sequence."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width = settings.width
        self.heads = settings.heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        if settings.traits.attention_bias_kv:
            self.bias_k = nn.Parameter(torch.empty(width))
            self.bias_v = nn.Parameter(torch.empty(width))
        self.has_bias_kv = settings.traits.attention_bias_kv

    def project(
        self, x_TD: torch.Tensor, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, [T, H, K] each."""
        q, k, v = (
            projection(x_TD).unflatten(-1, (self.heads, -1))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return (rotate(q, *rotation), rotate(k, *rotation), v) if rotation else (q, k, v)

    def forward(
        self,
        q_THK: torch.Tensor,
        k_THK: torch.Tensor,
        v_THK: torch.Tensor,
        where: Packed | Spans,
    ) -> torch.Tensor:
        """Mix the values within each sequence, [T, D]; `out_proj` is still to come.

        Args:
            where: the sequences, to be taken one by one, or their spans, to be taken at once.
        """
        if isinstance(where, Spans):
            return attend_at_once(q_THK, k_THK, v_THK, where, self.extra).flatten(1)
        return attend(q_THK, k_THK, v_THK, where.lengths, self.extra).flatten(1)

    @property
    def extra(self) -> Extra | None:
        """What every sequence attends to besides itself (ESM-1)."""
        if not self.has_bias_kv:
            return None
        return self.bias_k.view(self.heads, -1), self.bias_v.view(self.heads, -1)


class Layer(nn.Module):
    """Pre-norm transformer layer with exact GELU."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        eps = settings.eps
        self.attention_norm = nn.LayerNorm(settings.width, eps)
        self.attention = Attention(settings)
        self.ffn_norm = nn.LayerNorm(settings.width, eps)
        self.fc1 = nn.Linear(settings.width, settings.ffn_width)
        self.fc2 = nn.Linear(settings.ffn_width, settings.width)
        self.head_width = settings.head_width

    def forward(self, x_TD: torch.Tensor, packed: Packed, rotation: Rotation) -> torch.Tensor:
        if has_varlen_attention(x_TD, self.head_width):
            spans = packed.spans_with_extra if self.attention.has_bias_kv else packed.spans
            return self.at_once(x_TD, spans, *rotation)
        mixed_TD = self.attention(*tokenwise(self.before_mixing, x_TD, *rotation), packed)
        (x_TD,) = tokenwise(self.after_mixing, x_TD, mixed_TD)
        return x_TD

    def at_once(self, x_TD: torch.Tensor, spans: Spans, *rotation: torch.Tensor) -> torch.Tensor:
        """The whole layer on tensors alone, so that it can be compiled in one piece."""
        mixed_TD = self.attention(*self.before_mixing(x_TD, *rotation), spans)
        (x_TD,) = self.after_mixing(x_TD, mixed_TD)
        return x_TD

    def before_mixing(
        self, x_TD: torch.Tensor, *rotation: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """What tokens show each other: queries, keys and values, [T, H, K] each."""
        return self.attention.project(self.attention_norm(x_TD), rotation)

    def after_mixing(self, x_TD: torch.Tensor, mixed_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What each token makes of the others' values, [T, D]."""
        x_TD = x_TD + self.attention.out_proj(mixed_TD)
        return (x_TD + self.fc2(gelu(self.fc1(self.ffn_norm(x_TD)))),)

    def maps(self, x_TD: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """Attention of every token (rows) to every token of one sequence, [H, T, T] fp32."""
        q, k, _ = self.before_mixing(x_TD, *rotation)
        extra = self.attention.extra
        return attention_maps(q, k, None if extra is None else extra[0])

    def compile_parts(self) -> None:
        """Fuse what surrounds the matrix products; the first batches then take a minute.

        Where one kernel attends within all sequences the whole layer is one graph around it;
        elsewhere the parts before and after attention are. Nothing is compiled again as lengths
        vary, nor from layer to layer.
        """
        whole = torch.compile(self.at_once, dynamic=True)

        def at_once(x_TD: torch.Tensor, spans: Spans, *rotation: torch.Tensor) -> torch.Tensor:
            for each in (x_TD, *spans, *rotation):
                if isinstance(each, torch.Tensor):  # else lengths that are equal once are held so
                    torch._dynamo.maybe_mark_dynamic(each, 0)
            return whole(x_TD, spans, *rotation)

        self.at_once = at_once  # type: ignore[method-assign]
        self.before_mixing = torch.compile(self.before_mixing, dynamic=True)  # type: ignore
        self.after_mixing = torch.compile(self.after_mixing, dynamic=True)  # type: ignore


class Esm(nn.Module):
    """Masked language model of proteins (Rives et al., PNAS 2021; ESM-2: Lin et al., 2023).

    Without its language-model head it represents, but neither predicts nor trains.
    """

    def __init__(self, settings: ModelSettings, *, with_head: bool = True) -> None:
        super().__init__()
        self.settings = settings
        self.has_head = with_head
        traits, width, vocabulary = settings.traits, settings.width, len(settings.alphabet)
        self.embed = nn.Embedding(vocabulary, width)
        if traits.positions == "learned":
            self.positions = nn.Embedding(FIRST_POSITION + settings.max_positions, width)
        if traits.positions == "rotary":
            # Not a buffer: casting the model to bf16 must leave the angles in fp32.
            self.inv_freq = rotary_frequencies(settings.head_width)
        # Not a module: it is fitted after training and takes no part in it.
        self.contact_head: ContactHead | None = None
        # In training: keep each layer's input alone and compute the rest again on the way back.
        self.checkpoint_activations = False
        self.norm_before = nn.LayerNorm(width, settings.eps) if traits.norm_before else None
        self.layers = nn.ModuleList(Layer(settings) for _ in range(settings.layers))
        self.norm_after = nn.LayerNorm(width, settings.eps) if traits.norm_after else None
        if with_head:
            self._add_head()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Esm:
        """What `to` and its like call; the angles follow to another device, in their own type."""
        super()._apply(fn, recurse)
        if self.settings.rotary:
            self.inv_freq = self.inv_freq.to(self.embed.weight.device)
        return self

    def frequencies(self) -> torch.Tensor | None:
        """Rotary frequencies on the CPU, [K / 2] fp32; None for other positions."""
        return self.inv_freq.cpu() if self.settings.rotary else None

    def _add_head(self) -> None:
        settings = self.settings
        width, vocabulary = settings.width, len(settings.alphabet)
        if settings.traits.tied_head:
            self.head_dense = nn.Linear(width, width)
            self.head_norm = nn.LayerNorm(width, settings.eps)
        else:
            self.head_weight = nn.Parameter(torch.empty(vocabulary, width))
        self.head_bias = nn.Parameter(torch.zeros(vocabulary))

    @torch.no_grad()
    def initialise(self, seed: int) -> Esm:
        """Draw fresh weights: normal with deviation 0.02 (as BERT), biases 0; returns self."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            draw(name, parameter, generator)
        return self

    def forward(self, packed: Packed, targets: Targets | None = None) -> torch.Tensor:
        """Logits [T, V]; with `targets` the loss at each, [N] fp32, in nats.

        The loss is the cross entropy over the whole vocabulary; only the targets' places go
        through the head.
        """
        final_TD = self.represent(packed, [self.settings.layers])[-1]
        if targets is None:
            return self.predict(final_TD)
        logits = self.predict(final_TD.index_select(0, targets.at_N)).float()
        return nn.functional.cross_entropy(logits, targets.true_N, reduction="none")

    def represent(self, packed: Packed, layers: Iterable[int]) -> list[torch.Tensor]:
        """Representations [T, D] after the given layers, in their order.

        Layer 0 is the embedding; the last one is taken after the final norm, where there is one.
        """
        wanted = list(layers)
        kept: dict[int, torch.Tensor] = {}
        x_TD = self._embed(packed)
        rotation = self._rotation(packed, x_TD.dtype)
        last = self.settings.layers
        for index in range(max(wanted) + 1):
            if index > 0:
                x_TD = self._run_layer(self.layers[index - 1], x_TD, packed, rotation)
            if index == last and self.norm_after is not None:
                x_TD = self.norm_after(x_TD)
            if index in wanted:
                kept[index] = x_TD
        return [kept[index] for index in wanted]

    def _run_layer(
        self, layer: nn.Module, x_TD: torch.Tensor, packed: Packed, rotation: Rotation
    ) -> torch.Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(layer, x_TD, packed, rotation, use_reentrant=False)
        return layer(x_TD, packed, rotation)

    def attention_maps(self, packed: Packed) -> Iterator[torch.Tensor]:
        """Attention between all tokens of one sequence, layer by layer, [H, T, T] fp32 each.

        Rows are what attends; they sum to one, less what goes to ESM-1's learned extra key.
        """
        assert len(packed.lengths) == 1, "maps are computed for one sequence at a time"
        x_TD = self._embed(packed)
        rotation = self._rotation(packed, x_TD.dtype)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield layer.maps(x_TD, rotation)
            x_TD = layer(x_TD, packed, rotation)

    def compile_layers(self) -> None:
        """Fuse what surrounds the matrix products (torch.compile); see device.py for where."""
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.compile_parts()

    def predict(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Final representations to logits over the vocabulary, [N, V]; needs the head."""
        assert self.has_head
        (logits,) = tokenwise(self._predict, x_ND)
        return logits

    def _predict(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not self.settings.traits.tied_head:
            return (linear(x_ND, self.head_weight, self.head_bias),)
        hidden = self.head_norm(gelu(self.head_dense(x_ND)))
        return (linear(hidden, self.embed.weight, self.head_bias),)

    @property
    def letters(self) -> torch.Tensor:
        """The output's row of each token, [V, D]; in tied models also its embedding."""
        return self.embed.weight if self.settings.traits.tied_head else self.head_weight

    def _embed(self, packed: Packed) -> torch.Tensor:
        traits = self.settings.traits
        x_TD = self.embed(packed.tokens_T)
        if traits.scale_embedding:
            x_TD = x_TD * math.sqrt(self.settings.width)
        if traits.token_dropout:
            x_TD = x_TD * self._token_scale(packed)[:, None].to(x_TD.dtype)
        if traits.positions == "learned":
            x_TD = x_TD + self.positions(packed.position_T + FIRST_POSITION)
        if traits.positions == "sinusoidal":
            x_TD = x_TD + sinusoids(packed.position_T + FIRST_POSITION, x_TD.shape[1]).to(x_TD)
        return self.norm_before(x_TD) if self.norm_before is not None else x_TD

    def _token_scale(self, packed: Packed) -> torch.Tensor:
        """Token dropout: 0 at `<mask>`, elsewhere what restores the mean; per sequence, [T]."""
        masked_T = packed.tokens_T == self.settings.alphabet.mask
        masked_B = torch.zeros(len(packed.lengths), device=masked_T.device)
        masked_B = masked_B.index_add(0, packed.sequence_T, masked_T.float())
        scale_B = (1 - TRAINING_MASK_SHARE) / (1 - masked_B / packed.lengths_B).clamp(min=1e-6)
        return torch.where(masked_T, 0.0, scale_B[packed.sequence_T])

    def _rotation(self, packed: Packed, dtype: torch.dtype) -> Rotation:
        if self.settings.traits.positions != "rotary":
            return ()
        angle = packed.position_T[:, None, None].float() * self.inv_freq
        return angle.cos().to(dtype), angle.sin().to(dtype)


def tokenwise(
    function: Callable[..., tuple[torch.Tensor, ...]], *inputs: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Call a function that treats every token by itself, [T, ...] to [T, ...], in pieces."""
    total = len(inputs[0])
    outputs: tuple[torch.Tensor, ...] = ()
    for start, stop, size in token_chunks(inputs[0]):
        if size == total:  # a slice of all would cost its own kernels on the way back
            return function(*inputs)
        parts = function(*(_padded(each[start:stop], size) for each in inputs))
        if stop - start == total:
            return tuple(part[:total] for part in parts)
        outputs = outputs or tuple(p.new_empty(total, *p.shape[1:]) for p in parts)
        for output, part in zip(outputs, parts, strict=True):
            output[start:stop] = part[: stop - start]
    return outputs


def _padded(x: torch.Tensor, size: int) -> torch.Tensor:
    if len(x) == size:
        return x
    return pad(x, (0, 0) * (x.ndim - 1) + (0, size - len(x)))


def draw(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    """Fill a parameter of that name with fresh values."""
    if name.endswith("bias"):
        parameter.zero_()
    elif "norm" in name:
        parameter.fill_(1.0)
    else:
        parameter.normal_(0.0, 0.02, generator=generator)


def rotary_frequencies(head_width: int, base: float = ROTARY_BASE) -> torch.Tensor:
    """Rotary frequencies, [K / 2] fp32, in the arithmetic that transformers uses."""
    return 1.0 / (base ** (torch.arange(0, head_width, 2).float() / head_width))


def rotate(x_THK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions, halves paired (Su et al., 2021); cosine and sine are a `Rotation`."""
    first, second = x_THK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def sinusoids(position_T: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoidal positions as in fairseq: sines in the first half, cosines in the second."""
    half = width // 2
    steps = torch.arange(half, device=position_T.device, dtype=torch.float32)
    angle = position_T[:, None].float() * torch.exp(steps * -(math.log(10000.0) / (half - 1)))
    return torch.cat([angle.sin(), angle.cos()], dim=1)
