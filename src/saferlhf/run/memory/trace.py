"""What one forward or training pass of a model takes beyond its weights, counted on fake tensors.

The model is built by the code that builds it in a run, without weights, and the pass is run with the losses' own
operations (`ops/losses.py`, `ops/policy_losses.py`), which decide what is kept for the backward pass. Three things are
written down here a second time, because fake tensors have no content that a mask could select by: the selection of the
scored positions, in `_nll`, `_policy` and `_tempered`.

Blocks of a transformer are alike, so a model of L blocks need not be run: with two small numbers of blocks a and a + 1,

    bytes(L) = bytes(a) + (L - a) (bytes(a + 1) - bytes(a))

for the highest point of the part of the pass that ends with the second backward of a block, and for that of the part
that begins with the backward of the last but one. Between the two each block gives back its activations and takes its
gradients, so that the sum goes up or down evenly and has its maximum at one of the ends. Models whose blocks differ
are run whole.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from saferlhf.config.schema import AdapterConfig, BackboneConfig, QuantizationConfig
from saferlhf.models.causal import hidden_states, output_layer, unwrapped
from saferlhf.models.layers import blocks_of
from saferlhf.models.live_bytes import Bytes, LiveBytes
from saferlhf.models.score_model import ScoreModel
from saferlhf.models.shapes import count_weights, fake_backbone, faking, weight_nbytes
from saferlhf.models.value_model import prefix_scores
from saferlhf.rollout.draw import draw, exponential_noise

FEW = 4
"""Blocks of the smaller of the two models that are run."""

CHUNK = 1024
"""Positions whose logits are there at once in the likelihood loss (`ops/losses.py`)."""


@dataclass(frozen=True)
class ModelShape:
    """A model to be built without weights.

    Attributes:
        config: of transformers.
        backbone, quantization: how it is loaded.
        adapter: LoRA, or None.
        precision: of the trainer.
        heads: name -> width, for a score model or a critic; empty: a causal language model.
        pooling, layers, span: see `ScoreModel`.
        frozen: nothing is trained.
    """

    config: Any
    backbone: BackboneConfig
    quantization: QuantizationConfig
    adapter: AdapterConfig | None
    precision: str | None
    heads: tuple[tuple[str, int], ...] = ()
    pooling: str = "last"
    layers: tuple[int, ...] | None = None
    span: str = "all"
    frozen: bool = False

    @property
    def key(self) -> str:
        """Equal for equal shapes."""
        plain = {name: value for name, value in vars(self).items() if name not in ("config", "backbone")}
        keys = ("dtype", "attention", "gradient_checkpointing")
        plain["backbone"] = {key: getattr(self.backbone, key) for key in keys}
        plain |= {"config": self.config.to_dict(), "quantization": asdict(self.quantization)}
        plain["adapter"] = None if self.adapter is None else asdict(self.adapter)
        return json.dumps(plain, sort_keys=True, default=str)

    @property
    def blocks(self) -> int:
        """L."""
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def alike(self) -> bool:
        """Whether a small number of blocks tells about all of them."""
        text = self.config.get_text_config()
        kinds = set(getattr(text, "layer_types", None) or ["one"])
        chosen = self.layers is not None or (self.adapter is not None and self.adapter.blocks is not None)
        return len(kinds) == 1 and not chosen and self.blocks > FEW + 1

    def with_blocks(self, count: int) -> ModelShape:
        """The same with fewer blocks."""
        config = type(self.config).from_dict(self.config.to_dict())
        text = config.get_text_config()
        text.num_hidden_layers = count
        if getattr(text, "layer_types", None):
            text.layer_types = list(text.layer_types)[:count]
        return replace(self, config=config)


@dataclass(frozen=True)
class Pass:
    """One pass.

    Attributes:
        kind: nll (likelihood of responses) | score (one score per sequence) | policy (log-probabilities and entropy of
            responses) | value (a value per token) | states (hidden states) | prompt (read with a cache).
        rows, tokens: of the batch.
        scored: tokens of each row that the loss looks at.
        batches: micro-batches, at most 2: from the second on gradients are there already.
        gradients: whether there is a backward pass.
        tempered: whether logits are divided by a temperature.
        entropy: whether the policy's entropy is part of its loss.
    """

    kind: str
    rows: int
    tokens: int
    scored: int = 0
    batches: int = 1
    gradients: bool = True
    tempered: bool = False
    entropy: bool = False


@dataclass(frozen=True)
class Weights:
    """Weights of a model.

    Attributes:
        trained, frozen: bytes.
        trained_count, frozen_count: numbers; packed ones count as what they stand for.
        packed: bytes of the frozen ones that are packed to 4 bit, scales included.
        adamw, adamw_8bit: bytes of the optimizer's two states of what is trained.
        block, outside: bytes of the weights of one block, and of all that are in no block; packed ones left out.
    """

    trained: int
    frozen: int
    trained_count: int
    frozen_count: int
    packed: int
    adamw: int
    adamw_8bit: int
    block: int
    outside: int

    def extrapolated(self, more: Weights, steps: int) -> Weights:
        """From a model of some blocks and one of one block more, `steps` blocks further than the first."""
        found = {k: v + steps * (getattr(more, k) - v) for k, v in vars(self).items()}
        return Weights(**{**found, "block": self.block})


_weights: dict[str, Weights] = {}
_passes: dict[tuple[str, Pass], Bytes] = {}


# ------------------------------------------------------------------------------------------------ weights
def weights_of(shape: ModelShape) -> Weights:
    """Numbers and bytes of a model's weights."""
    if shape.key not in _weights:
        if shape.alike:
            few, more = (_weights_of(shape.with_blocks(n)) for n in (FEW, FEW + 1))
            _weights[shape.key] = few.extrapolated(more, shape.blocks - FEW)
        else:
            _weights[shape.key] = _weights_of(shape)
    return _weights[shape.key]


def _weights_of(shape: ModelShape) -> Weights:
    with faking():
        model = _build(shape)
        parameters = list(model.parameters())
        trained = [p for p in parameters if p.requires_grad]
        frozen = [p for p in parameters if not p.requires_grad]
        block = next(iter(blocks_of(_trunk(model))))
        inside = {id(p) for b in blocks_of(_trunk(model)) for p in b.parameters()}
        return Weights(
            trained=weight_nbytes(trained),
            frozen=weight_nbytes(frozen),
            trained_count=count_weights(trained),
            frozen_count=count_weights(frozen),
            packed=weight_nbytes(p for p in frozen if hasattr(p, "packed_nbytes")),
            adamw=sum(2 * p.numel() * p.element_size() for p in trained),
            adamw_8bit=sum(_states_8bit(p.numel()) for p in trained),
            block=weight_nbytes(p for p in block.parameters() if not hasattr(p, "packed_nbytes")),
            outside=weight_nbytes(p for p in parameters if id(p) not in inside and not hasattr(p, "packed_nbytes")),
        )


def _states_8bit(count: int) -> int:
    """bitsandbytes: one byte for each state of a weight and a float32 for 256; small tensors stay in float32."""
    if count < 4096:
        return 2 * 4 * count
    return 2 * count + 2 * 4 * -(-count // 256)


# ------------------------------------------------------------------------------------------------ passes
def pass_bytes(shape: ModelShape, work: Pass) -> Bytes:
    """What a pass takes at most beyond the weights, by kind."""
    key = (shape.key, work)
    if key not in _passes:
        if shape.alike:
            few, more = (_run(shape.with_blocks(n), work) for n in (FEW, FEW + 1))
            steps = shape.blocks - FEW
            ends = [low + (high - low) * steps for low, high in zip(few[:2], more[:2], strict=True)]
            _passes[key] = max(ends, key=lambda found: found.total)
        else:
            _passes[key] = _run(shape, work)[2]
    return _passes[key]


def _run(shape: ModelShape, work: Pass) -> tuple[Bytes, Bytes, Bytes]:
    """Highest up to the backward of the second block from the end, highest from the second block on, highest of all."""
    with faking():
        model = _build(shape)
        vocabulary = int(shape.config.get_text_config().vocab_size)
        live = LiveBytes(vocabulary)
        live.ignore([*model.parameters(), *model.buffers()])
        live.watch_gradients(model.parameters())
        _mark_windows(blocks_of(_trunk(model)), live)
        shared = (work.rows, work.tokens)
        ids, mask = torch.zeros(shared, dtype=torch.int64), torch.ones(shared, dtype=torch.bool)
        with live, _autocast(shape.precision), nullcontext() if work.gradients else torch.no_grad():
            for _ in range(work.batches):
                live.enter("first")
                loss = _forward(model, work, ids, mask)
                if work.gradients:
                    torch.autograd.backward(loss)
                del loss
        return live.highest("first"), live.highest("last"), live.highest()


def _mark_windows(blocks: nn.ModuleList, live: LiveBytes) -> None:
    """The windows of a backward pass begin when it reaches the output of a block."""

    def marks(window: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if states.requires_grad:
                states.register_hook(lambda gradient: live.enter(window))

        return hook

    if len(blocks) >= FEW:
        blocks[-3].register_forward_hook(marks("middle"))
        blocks[1].register_forward_hook(marks("last"))


def _autocast(precision: str | None) -> AbstractContextManager[Any]:
    if precision == "bf16-mixed":  # without a cache of weights, as Lightning has it
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    return nullcontext()


def _build(shape: ModelShape) -> Any:
    trunk = fake_backbone(
        shape.config, shape.backbone, shape.quantization, shape.adapter, lm_head=not shape.heads,
        precision=shape.precision,
    )  # fmt: skip
    if shape.heads:
        trunk = ScoreModel(trunk, dict(shape.heads), shape.pooling, layers=shape.layers, span=shape.span)
    if shape.frozen:
        trunk.requires_grad_(False)
    return trunk


def _trunk(model: Any) -> Any:
    return unwrapped(model.trunk if isinstance(model, ScoreModel) else model)


def _forward(model: Any, work: Pass, ids: Tensor, mask: Tensor) -> Tensor:
    """The loss of a micro-batch, or whatever a pass without gradients ends with."""
    if work.kind == "nll":
        return _nll(model, work, ids, mask)
    if work.kind == "policy":
        return _policy(model, work, ids, mask)
    if work.kind == "value":
        return prefix_scores(model, next(iter(model.heads)), ids, mask).sum()
    if work.kind == "states":
        found: Tensor = model.hidden(ids, mask)
        return found
    assert work.kind == "score"
    return torch.stack([scores.sum() for scores in model(ids, mask, mask).values()]).sum()


def _scored(work: Pass) -> Tensor:
    return torch.zeros(work.rows * work.scored, dtype=torch.int64)


def _nll(model: Any, work: Pass, ids: Tensor, mask: Tensor) -> Tensor:
    """As `response_nll_from_hidden`."""
    hidden = hidden_states(model, ids, mask)
    states = hidden.flatten(0, 1)[_scored(work)]  # (N, H)

    def chunk_nll(some: Tensor) -> Tensor:
        return F.cross_entropy(output_layer(model)(some).float(), ids.new_zeros(len(some)), reduction="none")

    if not work.gradients:
        return torch.cat([chunk_nll(some) for some in torch.split(states, CHUNK)])
    parts = [
        checkpoint(chunk_nll, s, use_reentrant=False, preserve_rng_state=False) for s in torch.split(states, CHUNK)
    ]
    return torch.cat(parts).sum()


def _tempered(logits: Tensor, work: Pass) -> Tensor:
    """As `_in_front` of `ops/policy_losses.py`."""
    rows = logits.flatten(0, 1)[_scored(work)].float()
    return rows / 2.0 if work.tempered else rows


def _policy(model: Any, work: Pass, ids: Tensor, mask: Tensor) -> Tensor:
    """As `token_logprobs` and `token_entropy` in the actor's loss."""
    found = unwrapped(model)(input_ids=ids, attention_mask=mask.long(), position_ids=ids, use_cache=False)
    logits = found.logits
    del found
    logprobs = -F.cross_entropy(_tempered(logits, work), _scored(work), reduction="none")
    if not work.gradients:
        return logprobs
    with nullcontext() if work.entropy else torch.no_grad():
        logp = _tempered(logits, work).log_softmax(dim=-1)
        possible = torch.isfinite(logp)
        entropy = -(logp.exp() * logp.masked_fill(~possible, 0.0)).sum(dim=-1)
    del logp, possible
    return logprobs.sum() - (entropy.sum() if work.entropy else 0.0)


# ------------------------------------------------------------------------------------------------ sampling
@dataclass(frozen=True)
class Sampling:
    """What sampling takes.

    Attributes:
        cache: bytes of the key-value cache of one token of one response.
        prompt: the highest point while the prompts are read, their cache included.
        drawing: bytes of the draw of one token for the whole batch.
    """

    cache: int
    prompt: Bytes
    drawing: Bytes


_samplings: dict[tuple[str, int, int, int], Sampling] = {}


def sampling_bytes(shape: ModelShape, rows: int, prompts: int, tokens: int) -> Sampling:
    """What a batch of responses takes.

    Args:
        shape: of the actor.
        rows: responses at once.
        prompts: different ones among theirs.
        tokens: of a prompt.
    """
    key = (shape.key, rows, prompts, tokens)
    if key not in _samplings:
        if shape.alike:
            few, more = (_sampling(shape.with_blocks(n), rows, prompts, tokens) for n in (FEW, FEW + 1))
            steps = shape.blocks - FEW
            cache = few.cache + (more.cache - few.cache) * steps
            prompt = few.prompt + (more.prompt - few.prompt) * steps
            _samplings[key] = Sampling(cache, prompt, few.drawing)
        else:
            _samplings[key] = _sampling(shape, rows, prompts, tokens)
    return _samplings[key]


def _sampling(shape: ModelShape, rows: int, prompts: int, tokens: int) -> Sampling:
    vocabulary = int(shape.config.get_text_config().vocab_size)
    with faking():
        model = unwrapped(_build(shape)).eval()
        live = LiveBytes(vocabulary)
        live.ignore([*model.parameters(), *model.buffers()])
        ids = torch.zeros(prompts, tokens, dtype=torch.int64)
        with live, _autocast(shape.precision), torch.no_grad():
            read = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=ids, use_cache=True, logits_to_keep=1
            )
            cache = sum(t.numel() * t.element_size() for layer in read.past_key_values.layers
                        for t in (layer.keys, layer.values))  # fmt: skip
        prompt, dtype = live.highest(), read.logits.dtype
        del read
        drawing = LiveBytes(vocabulary)
        with drawing, torch.no_grad():
            logits = torch.zeros(rows, vocabulary, dtype=dtype)
            draw(logits, exponential_noise(torch.zeros(rows, dtype=torch.int64), 0, vocabulary), 2.0)
        return Sampling(cache // (prompts * tokens), prompt, drawing.highest())
