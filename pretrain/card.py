"""The model card of a trained encoder: data, recipe, numbers, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pretrain.config import PretrainConfig

CONFIG_FILE = "pretrain.json"

_CARD = """---
library_name: streamformer
tags: [video, streaming, streamformer]
---
# {name}

A streaming video encoder, lifted from SigLIP (`{siglip}`) and trained by multitask video-language
alignment (`pretrain/`). Its weights inherit the licence of that SigLIP model and of the data below.

```python
from backbone import StreamformerModel, build_encoder

model = StreamformerModel.from_pretrained("{output}")
stream = build_encoder("streamformer:{output}").stream()
```

## Data

| task | objective | clips | annotations |
|---|---|---|---|
{data}

## Recipe

{updates} updates of AdamW (cosine from {lr:g} to {min_lr:g}, {warmup} of them warm-up), each over
one batch per task; clips of {num_frames} frames{long}; window {window}, a time table of
{num_frames} rows, past which positions follow "{positions}". Everything else is in
`{config_file}`.

The same run again, from the folder of this card:

```python
import json
from pretrain import PretrainConfig, train

config = json.load(open("{config_file}"))
train(PretrainConfig.from_dict(config | {{"output": "another folder"}}))
```

## Zero-shot metrics

{metrics}
"""


def model_card(
    config: PretrainConfig, sizes: Mapping[str, int], zero_shot: Mapping[str, Mapping[str, float]]
) -> str:
    """Markdown card of a finished run; ``sizes`` are clips per task."""
    model, optim = config.model, config.optim
    rows = [
        f"| {name} | {task.objective} | {sizes[name]} | `{json.dumps(dict(task.train))}` |"
        for name, task in config.tasks.items()
    ]
    numbers = [
        f"| {name} | {metric} | {value:.2f} |"
        for name, values in zero_shot.items()
        for metric, value in values.items()
    ]
    long = ""
    if config.long_share:
        long = f" ({config.long_share:.0%} of batches: {config.long_frames})"
    return _CARD.format(
        name=config.name,
        siglip=model.siglip,
        output=config.output,
        config_file=CONFIG_FILE,
        data="\n".join(rows),
        updates=optim.updates,
        lr=optim.lr,
        min_lr=optim.min_lr,
        warmup=optim.warmup_updates,
        num_frames=model.num_frames,
        long=long,
        window=model.window or "none",
        positions=model.temporal_positions,
        metrics="\n".join(["| task | metric | value |", "|---|---|---|", *numbers])
        if numbers
        else "None were asked for.",
    )
