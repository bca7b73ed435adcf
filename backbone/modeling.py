"""The streaming video encoder: SigLIP's vision transformer with causal attention through time.

StreamFormer ("Learning Streaming Video Representation via Multitask Training", ICCV 2025, section
3) keeps an image encoder as it is and gives each layer a temporal branch in front, after
TimeSformer's divided space-time attention:

      frame 0      frame 1      frame 2
     +---+---+    +---+---+    +---+---+
     | a | b |    | a | b |    | a | b |    temporal: each patch with itself in earlier frames,
     +---+---+    +---+---+    +---+---+              a0 <- a1 <- a2, b0 <- b1 <- b2
     | c | d |    | c | d |    | c | d |    spatial:  the patches of one frame among themselves,
     +---+---+    +---+---+    +---+---+              as in the image encoder

A learned gate, tanh of one scalar per layer, lets the temporal branch in; at zero the layer is
exactly the image layer. Only temporal attention looks across frames, and only backwards, so its
keys and values are all that a stream must remember (`cache.py`), and a clip and the next frames of
a stream run through the same ``forward``.

Letters: B clips or streams, T frames, N patches of a frame (row-major over the grid), D width,
A heads, d = D / A, S frames that may be seen, F rows of the time table. Tokens are frame-major,
``(B, T, N, D)``, everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .cache import StepPlan, StreamingCache, attendable
from .configuration import StreamformerConfig


@dataclass
class StreamformerOutput(ModelOutput):
    """What a forward pass returns.

    Attributes:
        last_hidden_state: patch tokens after the final norm, ``(B, T, N, D)``.
        pooler_output: one embedding per frame, ``(B, T, D)``.
        past_key_values: the stream's memory, when ``use_cache``.
        hidden_states: embeddings and each layer's output, ``L + 1`` tensors ``(B, T, N, D)``, the
            last one before the final norm, when ``output_hidden_states``.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    past_key_values: StreamingCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


# -- embeddings -----------------------------------------------------------------------------------


class PatchEmbeddings(nn.Module):
    """Pixels to tokens: patches projected, plus where (position table) and when (time table)."""

    def __init__(self, config: StreamformerConfig) -> None:
        super().__init__()
        self.patch_size, self.num_channels = config.patch_size, config.num_channels
        self.grid = config.image_size // config.patch_size
        width = config.hidden_size
        self.patch_embedding = nn.Conv2d(
            config.num_channels, width, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Parameter(torch.empty(1, self.grid**2, width))
        self.time_embedding = (
            nn.Parameter(torch.empty(1, config.num_frames, width))
            if config.temporal_attention
            else None
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor, time_rows: Tensor | None) -> Tensor:
        """Embed ``(B, T, C, H, W)`` frames whose time-table rows are ``(B or 1, T)``."""
        size, weight = self.patch_size, self.patch_embedding.weight
        height, width = (side // size for side in pixel_values.shape[-2:])
        patches = pixel_values.unflatten(-1, (width, size)).unflatten(-3, (height, size))
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)  # (B, T, N, C*P*P)
        # One matrix product: what the convolution does with patches that do not overlap.
        tokens = F.linear(patches.to(weight.dtype), weight.flatten(1), self.patch_embedding.bias)
        tokens = self.dropout(tokens + self.positions(height, width))  # (B, T, N, D)
        if self.time_embedding is not None:
            tokens = self.dropout(tokens + self.time_embedding[0, time_rows].unsqueeze(2))
        return tokens

    def positions(self, height: int, width: int) -> Tensor:
        """Position table for a grid of ``height`` x ``width`` patches, ``(1, N, D)``.

        Another grid than the trained one gets a bicubic resize to (height, width), in that order:
        the released code swaps them and so scrambles every non-square frame.
        """
        if (height, width) == (self.grid, self.grid):
            return self.position_embedding
        table = self.position_embedding.float().unflatten(1, (self.grid, self.grid))
        table = F.interpolate(
            table.permute(0, 3, 1, 2), size=(height, width), mode="bicubic", antialias=True
        )
        return table.flatten(2).transpose(1, 2).to(self.position_embedding.dtype)


def time_rows(config: StreamformerConfig, frames: Tensor, clip_length: int | None) -> Tensor:
    """Row of the time table for each frame number, by the config's policy.

    Args:
        config: its ``temporal_positions`` and ``num_frames`` decide.
        frames: frame numbers, any shape.
        clip_length: frames of the whole clip; None in a stream, whose length nobody knows.

    Raises:
        ValueError: for ``nearest`` in a stream.
    """
    policy, rows = config.temporal_positions, config.num_frames
    if policy == "hold":
        return frames.clamp(max=rows - 1)
    if policy in ("cycle", "reset"):
        return frames % rows
    if clip_length is None:
        raise ValueError(
            'temporal_positions="nearest" stretches the time table over a clip of known length and '
            'cannot stream; load the model with temporal_positions="hold", "cycle" or "reset"'
        )
    return frames if clip_length <= rows else frames * rows // clip_length


# -- attention ------------------------------------------------------------------------------------


class Memory(Protocol):
    """What attention asks of a memory: take new keys and values, give all that may be read."""

    def extend(self, layer: int, plan: StepPlan | None, new: Tensor) -> Tensor:
        """Store a layer's new keys and values, and return those to attend to."""


@dataclass(frozen=True)
class TimePlan:
    """What a forward pass knows about time before its first layer.

    Attributes:
        mask: boolean, broadcastable to ``(B*N, A, T, S)``; None when nothing need be hidden.
        is_causal: hide later frames without a mask (a whole clip, no window in its way).
        cache: the stream's memory and ``step``, what this pass does to it; None for a clip.
        frame: keys and values of the other patches of the frame, where only some patches run
            (`still.py`); None where all run.
    """

    mask: Tensor | None = None
    is_causal: bool = False
    cache: Memory | None = None
    step: StepPlan | None = None
    frame: Memory | None = None


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values, in this order."""

    def __init__(self, config: StreamformerConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """Scaled dot-product attention over ``(rows, A, tokens, d)``."""
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        # PyTorch's CPU kernel takes twice as long for one query as two batched products.
        is_step = query.shape[-2] == 1 and query.device.type == "cpu"
        if self.config._attn_implementation != "eager" and not is_step:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=is_causal
            )
        scores = query @ key.transpose(-1, -2) * self.head_dim**-0.5  # (rows, A, tokens, keys)
        if is_causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return F.dropout(scores.softmax(-1), dropout, self.training) @ value


class SpatialAttention(Attention):
    """The image encoder's attention: the patches of each frame among themselves."""

    def forward(self, tokens: Tensor, plan: TimePlan, layer: int) -> Tensor:
        """Attend within frames, ``(B, T, N, D)`` to ``(B, T, N, D)``."""
        batch, frames = tokens.shape[:2]
        qkv = self.qkv(tokens).flatten(0, 1)  # (B*T, N, 3D)
        qkv = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, *keys_values = qkv  # (B*T, A, N, d) each; a slice's backward would copy all three
        if plan.frame is not None:
            keys_values = plan.frame.extend(layer, None, qkv[1:])
        mixed = self.attend(query, *keys_values, mask=None, is_causal=False)  # (B*T, A, N, d)
        mixed = mixed.transpose(1, 2).flatten(2).unflatten(0, (batch, frames))
        return self.dropout(self.out(mixed))


class TemporalAttention(Attention):
    """Each patch with itself in the frames it may see."""

    def forward(self, tokens: Tensor, plan: TimePlan, layer: int) -> Tensor:
        """Attend through time, ``(B, T, N, D)`` to ``(B, T, N, D)``."""
        qkv = self.qkv(tokens).unflatten(-1, (3, self.num_heads, self.head_dim))
        qkv = qkv.permute(3, 0, 2, 4, 1, 5)  # (3, B, N, A, T, d)
        query, *keys_values = qkv
        if plan.step is not None and plan.step.blocks is not None:
            mixed = self.mix_blocks(query, qkv[1:], plan, layer)
        else:
            if plan.cache is not None:
                keys_values = plan.cache.extend(layer, plan.step, qkv[1:])
            mixed = self.mix(query, keys_values, plan.mask, plan.is_causal)
        return self.dropout(self.out(mixed.transpose(1, 2)))

    def mix(
        self,
        query: Tensor,
        keys_values: Iterable[Tensor],
        mask: Tensor | None,
        is_causal: bool = False,
    ) -> Tensor:
        """Queries ``(B, N, A, T, d)``, keys and values ``(B, N, A, S, d)`` each, to tokens.

        Returns:
            ``(B, N, T, D)``.
        """
        batch, patches = query.shape[:2]
        query, key, value = (x.flatten(0, 1) for x in (query, *keys_values))  # (B*N, A, ., d)
        mixed = self.attend(query, key, value, mask, is_causal)  # (B*N, A, T, d)
        return mixed.transpose(1, 2).flatten(2).unflatten(0, (batch, patches))

    def mix_blocks(self, query: Tensor, keys_values: Tensor, plan: TimePlan, layer: int) -> Tensor:
        """The same, some patches at a time: their memory is unfolded when they are reached."""
        mixed, mask = [], plan.mask
        for patches in plan.step.blocks:
            seen = plan.cache.extend(layer, plan.step, keys_values[:, :, patches], patches)
            if mask is not None and mask.shape[0] > 1:  # one for each row and patch
                mask = plan.mask.unflatten(0, query.shape[:2])[:, patches].flatten(0, 1)
            mixed.append(self.mix(query[:, patches], seen, mask))
        return torch.cat(mixed, dim=1)


# -- layers ---------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Two linears around an activation."""

    def __init__(self, config: StreamformerConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform tokens of any shape ``(…, D)``."""
        return self.fc2(self.act(self.fc1(tokens)))


def drop_path(branch: Tensor, rate: float, training: bool, shared: tuple[int, ...]) -> Tensor:
    """Stochastic depth: drop a residual branch at random, one draw per row.

    Args:
        branch: ``(B, T, N, D)``.
        rate: probability of dropping; kept rows are divided by ``1 - rate``.
        training: dropped only then.
        shared: dimensions along which one draw counts for all.
    """
    if not training or rate == 0.0:
        return branch
    shape = [1 if dim in shared else size for dim, size in enumerate(branch.shape)]
    return branch * branch.new_empty(shape).bernoulli_(1 - rate).div_(1 - rate)


class StreamformerLayer(GradientCheckpointingLayer):
    """Temporal branch behind its gate, then the image encoder's layer."""

    def __init__(self, config: StreamformerConfig, index: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.index = index
        self.drop_path = config.drop_path_rate * index / max(config.num_hidden_layers - 1, 1)
        self.has_time = config.temporal_attention
        if self.has_time:
            self.temporal_norm = nn.LayerNorm(width, eps=eps)
            self.temporal_attention = TemporalAttention(config)
            self.temporal_dense = nn.Linear(width, width)
            self.temporal_gate = nn.Parameter(torch.empty(()))
        self.spatial_norm = nn.LayerNorm(width, eps=eps)
        self.spatial_attention = SpatialAttention(config)
        self.mlp_norm = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(config)

    def forward(self, tokens: Tensor, plan: TimePlan) -> Tensor:
        """One layer on ``(B, T, N, D)``."""
        if self.has_time:
            branch = self.temporal_attention(self.temporal_norm(tokens), plan, self.index)
            branch = self.let_in(branch)
            tokens = tokens + drop_path(branch, self.drop_path, self.training, shared=(1, 3))
        branch = self.spatial_attention(self.spatial_norm(tokens), plan, self.index)
        tokens = tokens + drop_path(branch, self.drop_path, self.training, shared=(2, 3))
        branch = self.mlp(self.mlp_norm(tokens))
        return tokens + drop_path(branch, self.drop_path, self.training, shared=(1, 2, 3))

    def let_in(self, branch: Tensor) -> Tensor:
        """Project the temporal branch and pass it through its gate (folded away by ``fuse``)."""
        if self.temporal_dense is None:
            return branch
        return self.temporal_gate.tanh() * self.temporal_dense(branch)


class PoolingHead(nn.Module):
    """SigLIP's pooling: a learned probe attends to the patches of one frame, then an MLP.

    The probe is the same for every frame, so keys need not be made: of head ``a`` the score of
    patch ``x`` is ``q_a (Wk_a x + bk_a) = (q_a Wk_a) x`` plus a constant, which softmax drops. Nor
    need values: the weights sum to one, so mixing patches and then projecting the mix is the same.

    Attributes:
        query: the rows ``q_a Wk_a``, ``(A, D)``, where ``fuse`` has computed them once for all.
    """

    def __init__(self, config: StreamformerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.attention = nn.MultiheadAttention(width, config.num_attention_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.register_buffer("query", None, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool ``(B, T, N, D)`` to one embedding per frame, ``(B, T, D)``."""
        query = self.folded_query() if self.query is None else self.query  # (A, D)
        _, _, (weight, bias) = self.projections()  # of values
        scores = F.linear(tokens, query).transpose(-1, -2)  # (B, T, A, N)
        mixed = scores.softmax(-1).to(tokens.dtype) @ tokens  # (B, T, A, D)
        by_head = weight.unflatten(0, (query.shape[0], -1))  # (A, d, D)
        values = torch.einsum("btad,aed->btae", mixed, by_head).flatten(2) + bias  # (B, T, D)
        pooled = self.attention.out_proj(values)
        return pooled + self.mlp(self.layernorm(pooled))

    def folded_query(self) -> Tensor:
        """Queries of the probe, scaled, times the key projection of each head: ``(A, D)``."""
        of_query, (key_weight, _), _ = self.projections()
        heads = self.attention.num_heads
        query = F.linear(self.probe[0, 0], *of_query).unflatten(0, (heads, -1))  # (A, d)
        query = query * query.shape[-1] ** -0.5
        return torch.einsum("ae,aed->ad", query, key_weight.unflatten(0, (heads, -1)))

    def projections(self) -> list[tuple[Tensor, Tensor]]:
        """Weight ``(D, D)`` and bias ``(D,)`` of queries, of keys and of values."""
        joint = self.attention.in_proj_weight, self.attention.in_proj_bias
        return list(zip(*(x.chunk(3) for x in joint), strict=True))


def project_patches(head: nn.Module, patch_tokens: Tensor) -> Tensor:
    """Patch tokens in the space of frame embeddings: each what the frame's would be if it was all.

    The dense projection of StreamFormer's spatial tasks. A pooling head whose attention sees one
    key gives it all the weight, whatever the query, so values, out-projection and MLP remain:
    ``p = Wo (Wv x + bv) + bo``, then ``p + MLP(LN(p))``. It has no weights of its own.

    Args:
        head: ``PoolingHead``, or the head of a SigLIP image tower; any with an ``attention``
            (``nn.MultiheadAttention``), a ``layernorm`` and an ``mlp``.
        patch_tokens: ``(…, D)``, after the encoder's final norm.

    Returns:
        ``(…, D)``, not normalised.
    """
    attention = head.attention
    value = attention.in_proj_weight.chunk(3)[2], attention.in_proj_bias.chunk(3)[2]
    projected = attention.out_proj(F.linear(patch_tokens.to(value[0].dtype), *value))
    return projected + head.mlp(head.layernorm(projected))


# -- the model ------------------------------------------------------------------------------------


class StreamformerPreTrainedModel(PreTrainedModel):
    """What all models with this encoder share: their config, fresh weights, and loading."""

    config_class = StreamformerConfig
    base_model_prefix = "streamformer"
    main_input_name = "pixel_values"
    input_modalities = ("video",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["StreamformerLayer", "PoolingHead"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fresh weights: normal with ``initializer_range``; gates and time table zero.

        So a lifted image encoder starts as exactly that image encoder, frame by frame. The linears
        of the temporal branch are Xavier-uniform, as SigLIP's own attention: three of them follow
        one another, and a fixed 0.02 would all but silence them in a narrow model.
        """
        super()._init_weights(module)
        if isinstance(module, PatchEmbeddings):
            init.normal_(module.position_embedding, std=self.config.initializer_range)
            if module.time_embedding is not None:
                init.zeros_(module.time_embedding)
        elif isinstance(module, StreamformerLayer) and module.has_time:
            init.zeros_(module.temporal_gate)
            attention = module.temporal_attention
            for linear in (attention.qkv, attention.out, module.temporal_dense):
                init.xavier_uniform_(linear.weight)
        elif isinstance(module, PoolingHead):
            init.normal_(module.probe)
        elif getattr(module, "starts_at_zero", False):  # marked by add_lora
            init.zeros_(module.weight)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load from a folder or a hub id, in this layout or in the released one.

        Takes what transformers' ``from_pretrained`` takes; keyword arguments that name config
        fields change them. ``window`` and ``temporal_positions`` are free to change;
        ``num_frames`` resizes the time table linearly; a ``lora_rank`` where there was none adds
        adapters without effect, and 0 merges those that there are.

        Raises:
            CheckpointError: weights that do not cover the model, or are damaged; the message
                names the keys. Only the classification head may be missing or left over.
        """
        from . import checkpoints

        source = pretrained_model_name_or_path
        if checkpoints.is_released(source, kwargs):
            return checkpoints.from_released(cls, source, *args, **kwargs)
        return checkpoints.from_own(super().from_pretrained, source, *args, **kwargs)


class StreamformerModel(StreamformerPreTrainedModel):
    """The encoder: frames in, patch tokens and one embedding per frame out.

    Example:
        >>> model = StreamformerModel(StreamformerConfig(window=64)).eval()
        >>> clip = torch.zeros(1, 16, 3, 224, 224)                        # (B, T, C, H, W)
        >>> model(clip).pooler_output.shape                               # a clip
        torch.Size([1, 16, 768])
        >>> out = model(clip[:, :1], use_cache=True)                      # a stream: first frame,
        >>> out = model(clip[:, 1:2], past_key_values=out.past_key_values)  # next frame
    """

    def __init__(self, config: StreamformerConfig) -> None:
        super().__init__(config)
        self.embeddings = PatchEmbeddings(config)
        self.layers = nn.ModuleList(
            StreamformerLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = PoolingHead(config)
        if config.lora_rank:
            from .lora import add_lora

            add_lora(self, config.lora_rank)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        past_key_values: StreamingCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> StreamformerOutput | tuple:
        """Encode clips, or the next frames of streams.

        Args:
            pixel_values: frames ``(B, T, C, H, W)``, normalised; H and W divide into patches.
            past_key_values: memory of the streams so far; these frames come next.
            use_cache: start a memory if there is none; implied by ``past_key_values``. Streaming is
                inference: outputs carry no gradient then.
            output_hidden_states: also return the tokens before and after each layer.
            return_dict: False for a tuple.

        Raises:
            ValueError: wrong shape, or a stream that cannot go on as asked; the message says why.
        """
        cache = past_key_values
        if use_cache and cache is None:
            _, _, grid = self._check(pixel_values)
            cache = self.new_cache(pixel_values.shape[0], grid, pixel_values.device)
        # Streaming is inference: what a memory has seen could not be differentiated anyway.
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            keep = range(len(self.layers) + 1) if output_hidden_states else ()
            tokens, kept = self.trunk(pixel_values, cache, keep)
            tokens = self.post_layernorm(tokens)
            output = StreamformerOutput(
                last_hidden_state=tokens,
                pooler_output=self.head(tokens),
                past_key_values=cache,
                hidden_states=tuple(kept.values()) if output_hidden_states else None,
            )
        return output.to_tuple() if return_dict is False else output

    def trunk(
        self, pixel_values: Tensor, cache: StreamingCache | None = None, keep: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the layers without what follows them: the final norm and the pooling head.

        Args:
            pixel_values: as for ``forward``.
            cache: memory of the streams whose next frames these are; it advances.
            keep: layers whose tokens are wanted too, 0 for the embeddings.

        Returns:
            Tokens ``(B, T, N, D)`` before the final norm, and those of ``keep`` by layer.

        Raises:
            ValueError: as ``forward``.
        """
        _, frames, _ = self._check(pixel_values)
        if cache is None:
            plan, rows = self._clip_plan(frames, pixel_values.device)
        else:
            self.check_stream(pixel_values, cache)
            plan, rows = self.stream_plan(cache, frames, pixel_values.device)
        tokens, kept = self.run_layers(self.embeddings(pixel_values, rows), plan, keep)
        if cache is not None:
            cache.advance(frames)
        return tokens, kept

    def run_layers(
        self, tokens: Tensor, plan: TimePlan, keep: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """All layers on ``(B, T, N, D)``; also the tokens of the layers in ``keep``."""
        kept = {0: tokens} if 0 in keep else {}
        for number, layer in enumerate(self.layers, start=1):
            tokens = layer(tokens, plan)
            if number in keep:
                kept[number] = tokens
        return tokens, kept

    # -- time: which rows of the table, which frames may be seen ----------------------------------

    def _clip_plan(self, frames: int, device: torch.device) -> tuple[TimePlan, Tensor | None]:
        if not self.config.temporal_attention:
            return TimePlan(), None
        numbers = torch.arange(frames, device=device)
        rows = time_rows(self.config, numbers[None], clip_length=frames)  # (1, T)
        if not self.config.causal:
            return TimePlan(), rows
        if self.config.span is None or frames <= self.config.span:
            return TimePlan(is_causal=frames > 1), rows
        mask = attendable(numbers, numbers, self.config.window, self.segment)  # (T, T)
        return TimePlan(mask=mask), rows

    def stream_plan(
        self, cache: StreamingCache, frames: int, device: torch.device
    ) -> tuple[TimePlan, Tensor | None]:
        """What the next ``frames`` of a cache's streams see, and their rows of the time table."""
        if not self.config.temporal_attention:
            return TimePlan(), None
        numbers = torch.tensor(cache.positions)[:, None] + torch.arange(frames)  # (B, T)
        rows = time_rows(self.config, numbers, clip_length=None).to(device)
        step = cache.plan(frames)
        mask = step.mask
        if mask is not None:  # (1 or B, T, S) -> (1 or B*N, 1, T, S)
            if mask.shape[0] > 1:  # streams at different positions
                mask = mask.repeat_interleave(cache.num_patches, dim=0)
            mask = mask.unsqueeze(1)
        return TimePlan(mask=mask, cache=cache, step=step), rows

    @property
    def segment(self) -> int | None:
        """Frames after which a stream forgets, under the policy ``reset``; else None."""
        return self.config.num_frames if self.config.temporal_positions == "reset" else None

    @property
    def _remembered(self) -> tuple[int, int, int]:
        """Layers, heads and head width of the keys and values of a stream."""
        layers = self.config.num_hidden_layers if self.config.temporal_attention else 0
        return layers, self.config.num_attention_heads, self.config.head_dim

    def new_cache(
        self,
        batch_size: int,
        grid: tuple[int, int],
        device: torch.device | None = None,
        kept_as: torch.dtype | None = None,
    ) -> StreamingCache:
        """Empty memory for ``batch_size`` streams of frames of ``grid`` = (h, w) patches.

        ``kept_as`` as for :class:`StreamingCache`.
        """
        num_layers, num_heads, head_dim = self._remembered
        return StreamingCache(
            num_layers=num_layers,
            batch_size=batch_size,
            num_patches=grid[0] * grid[1],
            num_heads=num_heads,
            head_dim=head_dim,
            window=self.config.window,
            segment=self.segment,
            dtype=self.dtype,
            device=self.device if device is None else device,
            kept_as=kept_as,
        )

    # -- edge -------------------------------------------------------------------------------------

    def _check(self, pixel_values: Tensor) -> tuple[int, int, tuple[int, int]]:
        shape, config = tuple(pixel_values.shape), self.config
        if len(shape) != 5 or shape[2] != config.num_channels:
            raise ValueError(
                f"pixel_values has shape {shape}; expected (B, T, {config.num_channels}, H, W). "
                "A single frame is (B, 1, C, H, W)"
            )
        if 0 in shape:
            raise ValueError(f"pixel_values of shape {shape} is empty")
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values of type {pixel_values.dtype}; expected normalised floats "
                "(backbone.video.preprocess makes them of uint8 images)"
            )
        height, width = shape[3:]
        if height % config.patch_size or width % config.patch_size:
            raise ValueError(
                f"frames of {height} x {width} pixels do not divide into patches of "
                f"{config.patch_size}; resize or crop them first (backbone.video.preprocess)"
            )
        return shape[0], shape[1], (height // config.patch_size, width // config.patch_size)

    def check_stream(self, pixel_values: Tensor, cache: StreamingCache) -> None:
        """Raise ValueError where a cache's streams cannot go on with frames ``(B, T, C, H, W)``."""
        batch, _, grid = self._check(pixel_values)
        if self.training:
            raise ValueError("a stream needs model.eval(): in training, pass whole clips")
        if self.config.temporal_attention and not self.config.causal:
            raise ValueError(
                "causal=False: a bidirectional model needs later frames and cannot stream; "
                "pass whole clips, or load a causal model"
            )
        if cache.batch_size != batch:
            raise ValueError(
                f"{batch} frames for a memory of {cache.batch_size} streams; feed some of them "
                "through past_key_values.rows([...]), or start a new stream"
            )
        if (cache.made_for, cache.dtype) != (self._remembered, self.dtype):
            raise ValueError(
                f"the memory holds (layers, heads, head width) {cache.made_for} in {cache.dtype}, "
                f"the model has {self._remembered} in {self.dtype}; they do not belong together"
            )
        if cache.num_patches != grid[0] * grid[1]:
            raise ValueError(
                f"frames of {grid[0]} x {grid[1]} patches in a stream that began with "
                f"{cache.num_patches} patches; one stream has one resolution"
            )
        if (cache.window, cache.segment) != (self.config.window, self.segment):
            raise ValueError(
                f"the memory was made for window={cache.window}, segment={cache.segment} but "
                f"the model has window={self.config.window}, segment={self.segment}; "
                "start a new stream"
            )
