"""What every config of video question answering has, and the parts that both towers share.

``integrations.videoqa.configuration`` says what the keys of ``model`` mean,
``integrations.videoqa.train.StageConfig`` those of a stage. A stage may begin with the numbers of a
published one (``recipe``), and reads files of LLaVA JSON (``data``): ``json`` may be a pattern,
``{root}`` is ``data.root``.
"""

data = {"root": None, "dataset": "LLaVA-Video-178K"}

model = {
    "llm": None,  # folder or hub id of a causal LLM; None makes the mini one
    "tower_features": "last",  # the same layer of both towers, with the final norm
    "frame_token": False,
    "projector_type": "mlp2x_gelu",
    "pool_stride": 2,
    "merge_type": "spatial_unpad",
}

stream = {}  # memory and positions of the encoder: as its checkpoint says

stages = {}

train = {}

eval = {}
