"""The mmengine model: training on any clip, prediction as online, checkpoints of what trains."""

import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.optim import OptimWrapper
from mmengine.runner import load_state_dict
from mmengine.runner.checkpoint import get_state_dict

from backbone import StreamformerConfig, StreamformerEncoder, StreamformerModel
from integrations.ovis.criterion import ClipTargets
from integrations.ovis.head import HeadOutput
from integrations.ovis.model import ClipPreprocessor, OvisModel, VideoSample
from integrations.ovis.online import OnlineSegmenter

HEAD = {
    "num_classes": 3, "num_queries": 5, "width": 32, "mask_size": 32, "num_heads": 4,
    "pixel_layers": 1, "pixel_feedforward": 32, "decoder_layers": 2, "decoder_feedforward": 32,
    "embedding_size": 16,
}  # fmt: skip
LOSSES = {
    "loss_class", "loss_mask", "loss_dice", "loss_aux_class", "loss_aux_mask", "loss_aux_dice",
    "loss_contrastive", "loss_auxiliary",
}  # fmt: skip


def encoder(lora_rank=0, **fields) -> StreamformerEncoder:
    torch.manual_seed(0)
    model = StreamformerModel(
        StreamformerConfig(
            image_size=32,
            patch_size=8,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=24,
            num_frames=4,
            lora_rank=lora_rank,
            **fields,
        )  # fmt: skip
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "gate" in name or "time_embedding" in name or "lora_" in name:
                weight.normal_()
    return StreamformerEncoder(model, fused=not lora_rank)


def model(seed=1, video_encoder=None, **options) -> OvisModel:
    torch.manual_seed(seed)
    options = {"loss": {"num_points": 64}, **options}
    return OvisModel(video_encoder or encoder(), {"num_heads": 4, "stem_width": 4}, HEAD, **options)


def item(instances=2, frames=3, size=(32, 64)) -> dict:
    """Coloured squares on grey that move to the right, as a data set gives them."""
    clip = torch.full((frames, 3, *size), 90, dtype=torch.uint8)
    masks = torch.zeros(instances, frames, *size, dtype=torch.bool)
    for instance in range(instances):
        for frame in range(frames):
            rows = slice(16 * instance + 2, 16 * instance + 14)
            columns = slice(3 * frame + 4, 3 * frame + 16)
            masks[instance, frame, rows, columns] = True
            clip[frame, instance, rows, columns] = 250
    targets = ClipTargets(torch.arange(instances), masks)
    return {"inputs": {"frames": clip}, "data_samples": targets}


def losses_of(ovis: OvisModel, items: list[dict]) -> dict[str, torch.Tensor]:
    return ovis(**ovis.data_preprocessor(pseudo_collate(items), True), mode="loss")


# -- training -------------------------------------------------------------------------------------


def test_training_learns_to_segment_and_to_tell_instances_apart():
    ovis = model()
    weights = [weight for weight in ovis.parameters() if weight.requires_grad]
    wrapper = OptimWrapper(torch.optim.AdamW(weights, lr=3e-3))
    batch = pseudo_collate([item(), item(1)])
    logs = [ovis.train_step(batch, wrapper) for _ in range(40)]
    assert set(logs[0]) == LOSSES | {"loss"}
    for name in ("loss_class", "loss_mask", "loss_dice", "loss_contrastive"):
        assert logs[-1][name] < 0.4 * logs[0][name], name

    ovis.eval()
    frames = item()["inputs"]["frames"]
    sample = VideoSample(7, (32, 64))
    video = {"inputs": {"frames": [frames]}, "data_samples": [sample]}
    (prediction,) = ovis.val_step(video)
    assert prediction.video_id == 7
    best = [
        max(prediction.result.instances, key=lambda i: i.score * (i.label == c)) for c in (0, 1)
    ]
    for instance, truth in zip(best, item()["data_samples"].masks, strict=True):
        found = torch.from_numpy(instance.masks((32, 64)))
        overlap = (found & truth).sum() / (found | truth).sum()
        assert overlap > 0.6
    assert best[0].track != best[1].track


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("kind", ["no instances", "absent everywhere", "absent at first"])
def test_clips_with_little_or_nothing_in_them_train(kind, frames):
    data = item(0 if kind == "no instances" else 2, frames)
    if kind == "absent everywhere":
        data["data_samples"].masks[:] = False
    if kind == "absent at first":
        data["data_samples"].masks[:, 0] = False
    ovis = model().train()
    losses = losses_of(ovis, [data])
    assert set(losses) == LOSSES
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    for name, weight in (*ovis.adapter.named_parameters(), *ovis.head.named_parameters()):
        assert weight.grad is not None and weight.grad.isfinite().all(), name
    assert ovis.head.class_predictor.weight.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in ovis.encoder.parameters())


def test_masks_are_padded_as_frames_are():
    """Two sizes in a batch: objects must lie where predictions, padded too, have them."""
    preprocess = ClipPreprocessor((0.5,) * 3, (0.5,) * 3, 32)
    small, wide = item(size=(32, 40)), item(size=(36, 70))
    data = preprocess(pseudo_collate([small, wide]), True)
    frames, samples = data["inputs"]["frames"], data["data_samples"]
    assert frames.shape == (2, 3, 3, 64, 96)
    assert data["inputs"]["sizes"] == [(32, 40), (36, 70)]
    for number, original in enumerate((small, wide)):
        height, width = original["inputs"]["frames"].shape[-2:]
        expected = original["inputs"]["frames"].float() / 127.5 - 1
        torch.testing.assert_close(frames[number, ..., :height, :width], expected)
        assert frames[number, ..., height:, :].abs().sum() == 0
        assert frames[number, ..., width:].abs().sum() == 0
        masks = samples[number].masks
        assert masks.shape == (2, 3, 64, 96) and masks.dtype == torch.bool
        assert torch.equal(masks[..., :height, :width], original["data_samples"].masks)
        assert masks.sum() == original["data_samples"].masks.sum()


def test_tokens_computed_before_give_the_same_losses():
    ovis = model().train()
    items = [item(), item(1)]
    torch.manual_seed(4)
    expected = losses_of(ovis, items)
    for data in items:
        frames = ovis.data_preprocessor(pseudo_collate([data]), True)["inputs"]["frames"]
        layers = ovis.encoder.encode(frames, ovis.adapter.taps).layers
        data["inputs"]["layers"] = {tap: tokens[0] for tap, tokens in layers.items()}
    ovis.encoder.model.layers[0].mlp.fc1.weight.data.zero_()  # proof: the encoder does not run
    torch.manual_seed(4)
    torch.testing.assert_close(losses_of(ovis, items), expected)


def test_gradients_reach_the_encoder_only_where_asked():
    ovis = model(video_encoder=encoder(lora_rank=2), encoder_gradients=True).train()
    for name, weight in ovis.encoder.named_parameters():
        weight.requires_grad_("lora_" in name)
    sum(losses_of(ovis, [item()]).values()).backward()
    trained = {n for n, weight in ovis.encoder.named_parameters() if weight.grad is not None}
    assert trained == {n for n, weight in ovis.encoder.named_parameters() if weight.requires_grad}
    assert not ovis.encoder.training


def test_the_head_runs_in_full_precision_under_autocast():
    ovis = model().eval()
    frames = ovis.data_preprocessor(pseudo_collate([item()]), True)["inputs"]["frames"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ovis({"frames": frames})
    assert isinstance(output, HeadOutput)
    assert output.mask_logits.dtype == output.class_logits.dtype == torch.float32


# -- prediction -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["stream", "chunk"])
def test_prediction_is_what_the_online_segmenter_says_frame_by_frame(mode):
    """Six frames of an unpadded and a padded size, in chunks of four that the mode may restart."""
    streaming = encoder(window=3, temporal_positions="cycle")
    ovis = model(video_encoder=streaming, mode=mode, chunk_frames=4).eval()
    videos = [item(frames=6, size=size)["inputs"]["frames"] for size in ((32, 64), (40, 64))]
    samples = [VideoSample(n, tuple(clip.shape[-2:])) for n, clip in enumerate(videos)]
    data = {"inputs": {"frames": videos}, "data_samples": samples}
    predictions = ovis.test_step(data)
    for clip, prediction in zip(videos, predictions, strict=True):
        short = min(clip.shape[-2:])
        segmenter = OnlineSegmenter(
            ovis.encoder, ovis.adapter, ovis.head, short_side=short, mode=mode, chunk_frames=4
        )
        for image in clip.permute(0, 2, 3, 1).numpy():
            segmenter.push(np.ascontiguousarray(image))
        expected = segmenter.finish()
        found = prediction.result
        assert len(found.instances) == len(expected.instances) > 0
        assert found.num_frames == 6 and found.size == expected.size
        for one, other in zip(found.instances, expected.instances, strict=True):
            assert (one.track, one.label) == (other.track, other.label)
            assert one.score == pytest.approx(other.score, abs=1e-5)
            # Chunks round otherwise than single frames: a pixel at logit 0 may fall either way.
            assert (one.masks(found.size) != other.masks(found.size)).mean() < 1e-3


def test_the_two_modes_differ_once_a_chunk_is_full():
    streaming = encoder(window=3, temporal_positions="cycle")
    video = {
        "inputs": {"frames": [item(frames=6)["inputs"]["frames"]]},
        "data_samples": [VideoSample(0, (32, 64))],
    }
    scores = [
        [i.score for i in model(video_encoder=streaming, mode=mode, chunk_frames=4).eval()
            .val_step(video)[0].result.instances]
        for mode in ("stream", "chunk")
    ]  # fmt: skip
    assert scores[0] != scores[1]


def test_a_video_in_a_larger_size_of_its_own_gets_masks_of_that_size():
    ovis = model().eval()
    frames = item(frames=1)["inputs"]["frames"]
    data = {"inputs": {"frames": [frames]}, "data_samples": [VideoSample(3, (64, 128))]}
    (prediction,) = ovis.val_step(data)
    assert prediction.result.size == (64, 128)
    assert prediction.result.instances[0].masks((64, 128)).shape == (1, 64, 128)


# -- checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_holds_what_trains_and_loads_strictly():
    ovis, other = model(), model(seed=2)
    for state in (ovis.state_dict(), get_state_dict(ovis)):  # torch's way, and mmengine's
        assert not any(key.startswith("encoder.") for key in state)
        assert {key.partition(".")[0] for key in state} == {"adapter", "head"}
        other.load_state_dict(state, strict=True)
    load_state_dict(other, get_state_dict(ovis), strict=True)
    for key, value in ovis.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    lacking = {key: value for key, value in ovis.state_dict().items() if "level_emb" not in key}
    with pytest.raises(RuntimeError, match="adapter.level_embedding"):
        other.load_state_dict(lacking, strict=True)


def test_what_trains_inside_the_encoder_is_kept():
    ovis = model(video_encoder=encoder(lora_rank=2), encoder_gradients=True)
    for name, weight in ovis.encoder.named_parameters():
        weight.requires_grad_("lora_" in name)
    kept = {key for key in ovis.state_dict() if key.startswith("encoder.")}
    assert kept and all("lora_" in key for key in kept)
    other = model(video_encoder=encoder(lora_rank=2))
    for weight in other.encoder.parameters():
        weight.data.zero_() if weight.ndim == 0 else None
    other.load_state_dict(ovis.state_dict(), strict=True)


# -- refusals -------------------------------------------------------------------------------------


def test_refusals_name_what_does_not_fit():
    ovis = model()
    with pytest.raises(ValueError, match="mode='train' is not one of tensor, loss, predict"):
        ovis({"frames": torch.zeros(1, 1, 3, 32, 64)}, mode="train")
    with pytest.raises(ValueError, match="mode='online', chunk_frames=16: needs one of"):
        model(mode="online")
    with pytest.raises(ValueError, match=r"clips of \[3, 2\] frames; a batch needs one"):
        losses_of(ovis, [item(frames=3), item(frames=2)])
    floats = item()
    floats["inputs"]["frames"] = floats["inputs"]["frames"].float()
    with pytest.raises(ValueError, match=r"\(3, 3, 32, 64\) and type torch.float32; expected"):
        losses_of(ovis, [floats])
    with pytest.raises(TypeError, match="num_point"):
        model(loss={"num_point": 3})
