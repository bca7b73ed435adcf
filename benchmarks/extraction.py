"""How much of feature extraction is the model's: decoding and resizing should hide behind it.

Features of a video are extracted as ``python experiments/run.py extract`` does, with the base model
(ViT-B/16 at 224 pixels, random weights) or the encoder given; printed is the share of the time in
which the model ran.

    python benchmarks/extraction.py clip.mp4 --encoder streamformer:<folder>

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from floor import base_model

from backbone import FrameFeatures, StreamformerEncoder, build_encoder
from integrations.oad.features import FrameRule, extract_video

LEAST_SHARE = 0.9


def main() -> None:
    """Measure, print a sentence and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("video", type=Path)
    parser.add_argument("--encoder", metavar="KIND:SOURCE", help="default: random weights")
    parser.add_argument("--fps", type=float, default=4, help="frames per second read (4)")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoder = (
        build_encoder(options.encoder)
        if options.encoder
        else StreamformerEncoder(base_model(temporal_positions="reset"))
    )
    rule = FrameRule("stream", options.fps, chunk_frames=1)
    inside, features_of = [], encoder._features

    def watched(*arguments: object) -> FrameFeatures:
        begun = time.perf_counter()
        features = features_of(*arguments)
        _ = features.frame_embeddings  # pooling runs when asked for
        inside.append(time.perf_counter() - begun)
        return features

    encoder._features = watched
    begun = time.perf_counter()
    features, _ = extract_video(options.video, encoder, rule)
    whole = time.perf_counter() - begun
    share = sum(inside) / whole
    print(f"{len(features)} frames in {whole:.1f} s, of which the model ran {share:.1%}")
    print(
        json.dumps(
            {
                "benchmark": "extraction",
                "frames": len(features),
                "seconds": whole,
                "model_share": share,
                "within_limit": share >= LEAST_SHARE,
                **{name: str(value) for name, value in vars(options).items()},
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
