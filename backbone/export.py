"""A streaming step as a graph: nothing of Python in it, its memory going in and out as tensors.

A stream writes its memory where it lies, which a graph for another runtime cannot. Here the same
ring (`cache.py`) is an argument and a result: frame ``i`` goes to slot ``i % span``, and
``positions``, frames seen by each stream, say which slots hold what. So

    patch_tokens, frame_embeddings, positions, memory = step(frames, positions, memory)

is all there is to it. A stream begins at position 0, whatever its slots hold, so setting a position
to 0 starts it anew; one that has no frame this time keeps its old position, and what was stored for
it is overwritten next time. The layers are those of the fused model; nothing is computed otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from .cache import StepPlan
from .files import replacing
from .fusion import fuse
from .inference import tick
from .modeling import StreamformerModel

LARGEST_ONNX = 2**31 - 2**20  # bytes of weights; a protobuf file ends at 2 GiB


class StreamingStep(nn.Module):
    """The next frame of each of ``B`` streams, as a function of their memory.

    Args:
        model: the encoder; a fused copy is used.
        batch_size: streams ``B``.
        window: frames a frame may see, itself included; None keeps the model's.

    Attributes:
        span: slots ``S`` of the ring.

    Raises:
        ValueError: a model that cannot stream, or one whose memory has no bound.
    """

    def __init__(
        self, model: StreamformerModel, batch_size: int = 1, window: int | None = None
    ) -> None:
        super().__init__()
        if not (model.config.temporal_attention and model.config.causal):
            raise ValueError(
                f"temporal_attention={model.config.temporal_attention}, causal="
                f"{model.config.causal}: a streaming step needs attention to earlier frames only"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a step needs at least one stream")
        self.model = fuse(model)
        if window is not None:
            self.model.config.window = window
        grid = self.model.embeddings.grid
        cache = self.model.new_cache(batch_size, (grid, grid), torch.device("meta"))
        if cache.span is None:
            raise ValueError(
                "window=None: a graph has a memory of fixed size; say how many frames a frame may "
                "see, such as window=16"
            )
        self.span = cache.span
        self.num_layers, heads, width = cache.made_for
        self._slots = (2, batch_size, cache.num_patches, heads, self.span, width)

    def forward(
        self, frames: Tensor, positions: Tensor, memory: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Encode a frame of every stream.

        Args:
            frames: ``(B, 3, H, W)``, normalised, of the model's ``image_size``.
            positions: frames that each stream has seen, ``(B,)`` int64.
            memory: keys and values of each layer, ``(2, B, N, A, S, d)``; zeros at the start.

        Returns:
            Patch tokens ``(B, N, D)``, frame embeddings ``(B, D)``, and ``positions`` and
            ``memory`` for the next call.
        """
        ring = _Replaced(memory, positions % self.span)
        features = tick(self.model, frames, positions, ring, self.span)
        return *features, positions + 1, ring.memory

    def example(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Arguments of a first call: blank frames, positions 0, empty memory."""
        model, batch = self.model, self._slots[1]
        side, channels = model.config.image_size, model.config.num_channels
        frames = torch.zeros(batch, channels, side, side, dtype=model.dtype, device=model.device)
        positions = torch.zeros(batch, dtype=torch.int64, device=model.device)
        memory = [frames.new_zeros(self._slots) for _ in range(self.num_layers)]
        return frames, positions, memory


class _Replaced:
    """A memory that is replaced, not written; each frame goes to slot ``slots`` ``(B,)``."""

    def __init__(self, memory: list[Tensor], slots: Tensor) -> None:
        self.memory, self._slots = list(memory), slots

    def extend(self, layer: int, plan: StepPlan | None, new: Tensor) -> Tensor:
        """Keys and values ``(2, B, N, A, S, d)`` with the ``new`` ones ``(2, B, N, A, 1, d)``."""
        old = self.memory[layer]
        places = torch.arange(old.shape[4], device=old.device)
        written = (self._slots[:, None] == places)[:, None, None, :, None]  # (B, 1, 1, S, 1)
        self.memory[layer] = torch.where(written, new, old)
        return self.memory[layer]


@torch.no_grad()
def export_step(
    model: StreamformerModel, batch_size: int = 1, window: int | None = None
) -> torch.export.ExportedProgram:
    """The streaming step as a graph of PyTorch operators, for ``torch.export.save`` and compilers.

    Args and errors: those of :class:`StreamingStep`, whose ``forward`` the graph's module has.
    """
    step = StreamingStep(model, batch_size, window)
    return torch.export.export(step, step.example())


def export_onnx(
    model: StreamformerModel, path: str | Path, batch_size: int = 1, window: int | None = None
) -> None:
    """Write the streaming step as an ONNX file, weights included.

    Inputs are ``frames``, ``positions`` and ``memory.0``, ``memory.1``, …, outputs
    ``patch_tokens``, ``frame_embeddings``, ``next_positions`` and ``next_memory.0``, …; shapes are
    those of :class:`StreamingStep`. The metadata entry ``streamformer`` holds the model's config.

    Raises:
        ValueError: see :class:`StreamingStep`; or more weights than one ONNX file holds.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if weights > LARGEST_ONNX:
        raise ValueError(
            f"{weights / 2**30:.1f} GiB of weights do not fit into one ONNX file (2 GiB); write "
            "torch.export.save(export_step(model), path), which has no such bound"
        )
    program = export_step(model, batch_size, window)
    layers = range(model.config.num_hidden_layers)
    exported = torch.onnx.export(
        program,
        input_names=["frames", "positions", *(f"memory.{n}" for n in layers)],
        output_names=[
            "patch_tokens", "frame_embeddings", "next_positions",
            *(f"next_memory.{n}" for n in layers),
        ],
        dynamo=True,
        verbose=False,
    )  # fmt: skip
    about = {**model.config.to_diff_dict(), "batch_size": batch_size}
    exported.model.metadata_props["streamformer"] = json.dumps(about, default=str)
    with replacing(path) as temporary:
        exported.save(temporary, external_data=False)


class OnnxStream:
    """Frames of one or more streams through a file of :func:`export_onnx`, in ONNX Runtime.

    Args:
        path: the file.
        threads: of ONNX Runtime; 0 lets it choose.

    Example:
        >>> stream = OnnxStream("encoder.onnx")
        >>> tokens, embeddings = stream.push(frames)     # (B, N, D), (B, D)
    """

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=onnxruntime.get_available_providers()
        )
        _, positions, *memory = self._session.get_inputs()
        self._names = [entry.name for entry in self._session.get_inputs()]
        self._state = [torch.zeros(positions.shape, dtype=torch.int64).numpy()]
        self._state += [torch.zeros(entry.shape).numpy() for entry in memory]

    def push(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Patch tokens ``(B, N, D)`` and embeddings ``(B, D)`` of ``frames`` ``(B, 3, H, W)``."""
        fed = dict(zip(self._names, [frames.numpy(), *self._state], strict=True))
        tokens, embeddings, *self._state = self._session.run(None, fed)
        return torch.from_numpy(tokens), torch.from_numpy(embeddings)

    def reset(self, row: int) -> None:
        """Let one stream start anew at frame 0."""
        self._state[0][row] = 0
