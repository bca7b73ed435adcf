"""Action recognition: the encoder with a linear classifier on the mean of its frame embeddings.

The read-out of StreamFormer's recognition experiments (section 4): frame embeddings, averaged over
the clip, normed, dropped out in training, classified. Weights of the released fine-tuned models
load through ``from_pretrained``; a checkpoint without a head gets a fresh one.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from .configuration import StreamformerConfig
from .modeling import StreamformerModel, StreamformerPreTrainedModel


class StreamformerForVideoClassification(StreamformerPreTrainedModel):
    """Clips to logits.

    Example:
        >>> model = StreamformerForVideoClassification.from_pretrained("…", num_labels=400)
        >>> model(clip).logits.shape                                      # clip (B, T, 3, H, W)
        torch.Size([1, 400])
    """

    def __init__(self, config: StreamformerConfig) -> None:
        super().__init__(config)
        self.streamformer = StreamformerModel(config)
        self.fc_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple:
        """Classify clips.

        Args:
            pixel_values: ``(B, T, C, H, W)``, normalised.
            labels: class numbers ``(B,)``; then the mean cross entropy is returned as ``loss``.
            output_hidden_states: also return the encoder's ``hidden_states``.
            return_dict: False for a tuple.

        Returns:
            ``logits`` ``(B, C)``, and ``loss`` and ``hidden_states`` where asked for.
        """
        encoded = self.streamformer(pixel_values, output_hidden_states=output_hidden_states)
        frames = encoded.pooler_output  # (B, T, D)
        if self.config.released_pooling:
            frames = self.streamformer.head(_released_order(encoded.last_hidden_state))
        logits = self.classifier(self.dropout(self.fc_norm(frames.mean(dim=1))))
        output = ImageClassifierOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels),
            logits=logits,
            hidden_states=encoded.hidden_states,
        )
        return output.to_tuple() if return_dict is False else output


def _released_order(tokens: Tensor) -> Tensor:
    """Group ``(B, T, N, D)`` tokens as the released classifiers saw them in training.

    Their code cuts a patch-major sequence into pieces of N, as if it were frame-major: each "frame"
    that is pooled holds N / T patches of all T frames.
    """
    return tokens.transpose(1, 2).reshape(tokens.shape)
