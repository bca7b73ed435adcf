"""Weights of adapter and head: published layouts, our own file, and files that are not right."""

import collections
import pickle

import pytest
import torch
from safetensors.torch import save_file
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from backbone.checkpoints import CheckpointError
from integrations.ovis.adapter import AdapterConfig, ViTAdapter
from integrations.ovis.head import HeadConfig, SegmentationHead
from integrations.ovis.weights import (
    adapter_to_released,
    head_to_detectron2,
    load_head,
    load_released_adapter,
    load_segmenter,
    read_notes,
    save_segmenter,
    start_head,
)


def small_head(**sizes) -> SegmentationHead:
    defaults = {
        "in_channels": 6, "num_classes": 3, "num_queries": 5, "width": 32, "mask_size": 16,
        "num_heads": 4, "pixel_layers": 1, "pixel_feedforward": 16, "decoder_layers": 2,
        "decoder_feedforward": 16, "embedding_size": 8,
    }  # fmt: skip
    return SegmentationHead(HeadConfig(**{**defaults, **sizes}))


def small_adapter() -> ViTAdapter:
    sizes = {"embed_dim": 8, "patch_size": 16, "stem_width": 4, "num_heads": 2, "num_points": 2}
    return ViTAdapter(AdapterConfig(taps=(1, 1, 2, 2), **sizes))


def published(head: SegmentationHead) -> dict[str, torch.Tensor]:
    """The head as a published checkpoint has it: with what belongs to other parts, no tracking."""
    state = {
        f"sem_seg_head.{key}": value
        for key, value in head_to_detectron2(head.state_dict()).items()
        if "reid_embed" not in key
    }
    return {
        "backbone.stem.weight": torch.zeros(1),
        "criterion.empty_weight": torch.zeros(1),
        **state,
    }


def assert_equal(head: SegmentationHead, other: SegmentationHead, but: tuple[str, ...] = ()):
    ours, theirs = head.state_dict(), other.state_dict()
    for key in ours:
        if key not in but:
            assert torch.equal(ours[key], theirs[key]), key


def test_a_published_head_starts_one_of_another_backbone_and_other_classes(tmp_path):
    theirs, ours = small_head(num_classes=80, in_channels=10), small_head()
    torch.save({"model": published(theirs), "iteration": 7}, tmp_path / "model.pth")
    fresh = start_head(ours, tmp_path / "model.pth")
    assert sorted(fresh) == sorted(
        [f"pixel_decoder.input_projections.{i}.0.weight" for i in range(3)]
        + ["pixel_decoder.adapter_1.0.weight", "class_predictor.weight", "class_predictor.bias"]
        + [f"embedder.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    )
    assert_equal(ours, theirs, but=tuple(fresh))


def test_a_pickle_of_the_model_zoo_is_read_with_its_former_names(tmp_path):
    theirs, ours = small_head(), small_head()
    state = {k: v.numpy() for k, v in published(theirs).items()}
    queries = state.pop("sem_seg_head.predictor.query_feat.weight")
    state["sem_seg_head.predictor.static_query.weight"] = queries
    content = {"model": collections.OrderedDict(state), "__author__": "somebody"}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content))
    fresh = start_head(ours, tmp_path / "model.pkl")
    assert all(key.startswith("embedder.") for key in fresh)
    assert_equal(ours, theirs, but=tuple(fresh))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("gotcha",))

    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": Evil()}))
    with pytest.raises(CheckpointError, match=r"model.pkl .*it asks for builtins.print"):
        start_head(small_head(), tmp_path / "model.pkl")
    (tmp_path / "other.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(CheckpointError, match="other.pkl holds no state dict: found list"):
        start_head(small_head(), tmp_path / "other.pkl")


def test_a_stock_transformers_model_starts_the_head_and_says_the_same(tmp_path):
    swin = SwinConfig(
        image_size=32, patch_size=4, embed_dim=6, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1],
        window_size=2, out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    head = small_head(num_classes=4, pixel_feedforward=8)
    sizes = head.config.mask2former().to_dict()
    names = (
        "num_queries", "feature_size", "hidden_dim", "mask_feature_size", "num_attention_heads",
        "encoder_layers", "encoder_feedforward_dim", "decoder_layers", "dim_feedforward",
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, num_labels=4, **{name: sizes[name] for name in names}
    )
    stock = Mask2FormerForUniversalSegmentation(config).eval()
    save_file(stock.state_dict(), tmp_path / "model.safetensors")
    fresh = start_head(head, tmp_path / "model.safetensors")
    # Swin's widths are 6, 12, 24, 48: only the finest map has ours.
    assert sorted(k for k in fresh if not k.startswith("embedder.")) == [
        f"pixel_decoder.input_projections.{i}.0.weight" for i in range(3)
    ]
    theirs, ours = stock.model.pixel_level_module.decoder.encoder, head.pixel_decoder.encoder
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key
    levels = [torch.randn(2, 32, size, size) for size in (1, 2, 4)]
    pixels = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        expected = stock.model.transformer_module(levels, pixels)
        found = head.eval().transformer(levels, pixels)
        queries = expected.intermediate_hidden_states[-1]
        torch.testing.assert_close(head.class_predictor(queries), stock.class_predictor(queries))
    torch.testing.assert_close(found.masks_queries_logits[-1], expected.masks_queries_logits[-1])


def test_anything_else_that_differs_is_refused_by_name(tmp_path):
    theirs = published(small_head())
    path = tmp_path / "model.pth"

    def refused(state, text):
        torch.save({"model": state}, path)
        with pytest.raises(CheckpointError, match=text):
            start_head(small_head(), path)

    refused({**theirs, "sem_seg_head.predictor.odd": torch.zeros(1)}, "1 unexpected: predictor.odd")
    lacking = {k: v for k, v in theirs.items() if "decoder_norm.bias" not in k}
    refused(lacking, r"1 missing: transformer\.decoder\.layernorm\.bias")
    other = published(small_head(num_queries=7))
    refused(other, r"2 misshapen: .*\(7, 32\) instead of \(5, 32\)")
    refused({"stem.weight": torch.zeros(1)}, "foreign layout: it holds stem.weight")
    torch.save({"model": theirs}, path)
    with pytest.raises(CheckpointError, match="6 missing: embedder.0.weight"):
        load_head(small_head(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="model.pth .*cannot be read"):
        start_head(small_head(), path)


def test_a_released_adapter_is_loaded_beside_its_encoder_and_head(tmp_path):
    theirs, ours = small_adapter(), small_adapter()
    state = {f"backbone.{k}": v for k, v in adapter_to_released(theirs.state_dict()).items()}
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    state["backbone.encoder.layer.0.output.dense.bias"] = torch.zeros(1)
    state["sem_seg_head.predictor.class_embed.bias"] = torch.zeros(1)
    torch.save({"model": state}, tmp_path / "model.pth")
    load_released_adapter(ours, tmp_path / "model.pth")
    for key, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key
    del state["backbone.level_embed"]
    torch.save({"model": state}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="1 missing: level_embedding"):
        load_released_adapter(ours, tmp_path / "model.pth")


def test_our_own_file_builds_adapter_and_head_again(tmp_path):
    adapter, head = small_adapter().train(), small_head(in_channels=8)
    adapter(torch.randn(2, 1, 3, 32, 64), {tap: torch.randn(2, 1, 8, 8) for tap in (1, 2)})
    path = tmp_path / "segmenter.safetensors"
    save_segmenter(adapter, head, path, {"encoder": "siglip:x", "classes": ["a", "b", "c"]})
    found_adapter, found_head = load_segmenter(path)
    assert read_notes(path) == {"encoder": "siglip:x", "classes": ["a", "b", "c"]}
    assert (found_adapter.config, found_head.config) == (adapter.config, head.config)
    assert not found_adapter.training and not found_head.training
    frames, layers = torch.randn(1, 2, 3, 32, 32), dict.fromkeys((1, 2), torch.randn(1, 2, 4, 8))
    expected = head.eval()(adapter.eval()(frames, layers))
    output = found_head(found_adapter(frames, layers))
    torch.testing.assert_close(output.mask_logits, expected.mask_logits)
    torch.testing.assert_close(output.query_embeddings, expected.query_embeddings)


def test_a_file_of_ours_that_is_not_right_is_refused(tmp_path):
    path = tmp_path / "segmenter.safetensors"
    with pytest.raises(FileNotFoundError):
        load_segmenter(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="is not a segmenter .*published heads use start_he"):
        load_segmenter(path)
    save_segmenter(small_adapter(), small_head(in_channels=8), path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'num_queries\\": 5', b'num_queries\\": 0'))
    with pytest.raises(CheckpointError, match="config of the head does not hold: head num_queries"):
        load_segmenter(path)
    path.write_bytes(data.replace(b'num_queries\\": 5', b'num_queries\\": 6'))
    with pytest.raises(CheckpointError, match=r"2 misshapen: .*\(5, 32\) instead of \(6, 32\)"):
        load_segmenter(path)
    path.write_bytes(data[:-50])
    with pytest.raises(CheckpointError, match="bytes. cannot be read"):
        read_notes(path)
