"""Our backbone inside stock detectron2 where that is installed, and what is said where not."""

import importlib
import importlib.util
import json

import numpy as np
import pytest
import torch

from backbone import StreamformerConfig, StreamformerModel
from integrations.ovis.layout import read_ytvis
from integrations.ovis.rle import encode

PRESENT = importlib.util.find_spec("detectron2") is not None
needs_detectron2 = pytest.mark.skipif(not PRESENT, reason="detectron2 is not installed")


@pytest.mark.skipif(PRESENT, reason="detectron2 is installed")
def test_says_what_is_missing_and_what_works_without():
    with pytest.raises(ImportError, match=r"for detectron2.*environment\.yml.*work without it"):
        importlib.import_module("integrations.ovis.detectron2_backbone")


@pytest.fixture
def ours():
    return importlib.import_module("integrations.ovis.detectron2_backbone")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Spec of a tiny encoder on disk, its time gates open."""
    torch.manual_seed(0)
    config = StreamformerConfig(
        image_size=32, patch_size=16, hidden_size=24, num_hidden_layers=4,
        num_attention_heads=2, intermediate_size=48, num_frames=4,
    )  # fmt: skip
    model = StreamformerModel(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "gate" in name:
                weight.fill_(0.7)
    folder = tmp_path_factory.mktemp("encoder")
    model.save_pretrained(folder)
    return f"streamformer:{folder}"


@pytest.fixture
def cfg(ours, encoder):
    """Mask R-CNN with a pyramid, as small as it gets."""
    from detectron2.config import get_cfg

    cfg = get_cfg()
    ours.add_streamformer_config(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.MASK_ON = "cpu", True
    cfg.MODEL.BACKBONE.NAME = "build_streamformer_fpn_backbone"
    cfg.MODEL.STREAMFORMER.ENCODER = encoder
    cfg.MODEL.STREAMFORMER.ADAPTER.NUM_HEADS = 4
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 2, 16
    cfg.MODEL.ROI_BOX_HEAD.NAME, cfg.MODEL.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM, cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 32, 7
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM, cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 16, 1
    return cfg


@pytest.fixture
def videos(tmp_path):
    from PIL import Image

    masks = np.zeros((3, 40, 56), bool)
    masks[:2, 8:30, 10:40] = True
    rle = encode(masks)
    files = [f"v/{n}.png" for n in range(3)]
    (tmp_path / "v").mkdir()
    rng = np.random.default_rng(0)
    for file in files:
        Image.fromarray(rng.integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(tmp_path / file)
    document = {
        "videos": [{"id": 4, "height": 40, "width": 56, "file_names": files}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "owl"}],
        "annotations": [{"id": 1, "video_id": 4, "category_id": 7, "iscrowd": 0,
                         "segmentations": rle,
                         "bboxes": [mask and [10, 8, 30, 22] for mask in rle]}],
    }  # fmt: skip
    (tmp_path / "d.json").write_text(json.dumps(document))
    return read_ytvis(tmp_path / "d.json", tmp_path)


@needs_detectron2
def test_a_stock_mask_rcnn_trains_a_step_and_infers(ours, cfg):
    from detectron2.modeling import build_model
    from detectron2.structures import BitMasks, Boxes, Instances
    from detectron2.utils.events import EventStorage

    model = build_model(cfg).train()
    masks = torch.zeros(1, 40, 56, dtype=torch.bool)
    masks[0, 8:30, 10:40] = True
    target = Instances((40, 56))
    target.gt_boxes = Boxes(torch.tensor([[10.0, 8.0, 40.0, 30.0]]))
    target.gt_classes, target.gt_masks = torch.tensor([1]), BitMasks(masks)
    inputs = [
        {"image": torch.randint(0, 255, (3, 40, 56), dtype=torch.uint8), "instances": target}
        for _ in range(2)
    ]
    ours.set_clip_frames(model, 2)
    with EventStorage():
        losses = model(inputs)
    sum(losses.values()).backward()
    bottom_up = model.backbone.bottom_up
    assert all(weight.grad is None for weight in bottom_up.encoder.parameters())
    assert all(weight.grad is not None for weight in bottom_up.adapter.parameters())
    torch.optim.SGD([w for w in model.parameters() if w.requires_grad], 1e-3).step()
    model.eval()
    with torch.no_grad():
        found = model([{"image": item["image"], "height": 80, "width": 112} for item in inputs])
    assert len(found) == 2 and found[0]["instances"].image_size == (80, 112)


@needs_detectron2
def test_images_of_a_clip_see_earlier_ones_and_only_these(ours, cfg):
    from detectron2.modeling import build_backbone

    cfg.MODEL.BACKBONE.NAME = "build_streamformer_backbone"
    backbone = build_backbone(cfg).eval()
    shapes = backbone.output_shape()
    assert {name: shape.stride for name, shape in shapes.items()} == {
        "res2": 4, "res3": 8, "res4": 16, "res5": 32
    }  # fmt: skip
    assert backbone.size_divisibility == 32
    images = torch.randn(4, 3, 64, 96)
    alone = backbone(images)
    for name, shape in shapes.items():
        assert alone[name].shape == (4, shape.channels, 64 // shape.stride, 96 // shape.stride)
    ours.set_clip_frames(backbone, 4)
    whole = backbone(images)
    assert torch.allclose(whole["res4"][0], alone["res4"][0], atol=1e-5)
    assert not torch.allclose(whole["res4"][3], alone["res4"][3], atol=1e-3)
    later = images.clone()
    later[3] += 1
    assert torch.equal(backbone(later)["res4"][:3], whole["res4"][:3])
    with pytest.raises(ValueError, match="3 images are not whole clips of 4 frames"):
        backbone(images[:3])
    with pytest.raises(ValueError, match="0 backbones in a Linear"):
        ours.set_clip_frames(torch.nn.Linear(1, 1), 2)


@needs_detectron2
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cfg: setattr(cfg.MODEL.STREAMFORMER, "ENCODER", ""), "ENCODER is empty"),
        (lambda cfg: setattr(cfg.INPUT, "FORMAT", "BGR"), "INPUT.FORMAT is 'BGR'"),
        (lambda cfg: setattr(cfg.MODEL, "PIXEL_STD", [1.0] * 3), r"PIXEL_STD is \[1\.0, 1\.0"),
    ],
)
def test_configs_that_do_not_fit_are_refused(cfg, change, message):
    from detectron2.modeling import build_backbone

    change(cfg)
    with pytest.raises(ValueError, match=message):
        build_backbone(cfg)


@needs_detectron2
def test_data_sets_are_registered_and_predictions_scored(ours, videos):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for name, register in (
        ("ours_videos", ours.register_videos),
        ("ours_frames", ours.register_frames),
    ):
        register(name, videos)
        assert MetadataCatalog.get(name).thing_classes == ["cat", "owl"]
    (video,) = DatasetCatalog.get("ours_videos")
    assert [len(frame) for frame in video["annotations"]] == [1, 1, 0]
    frames = DatasetCatalog.get("ours_frames")
    assert [frame["image_id"] for frame in frames] == [1, 2, 3]
    assert frames[0]["annotations"][0]["category_id"] == 1
    evaluator = ours.TrackEvaluator(videos)
    masks = videos.videos[0].tracks[0].masks()
    outputs = {"pred_scores": [0.9], "pred_labels": [1], "pred_masks": [torch.from_numpy(masks)]}
    evaluator.reset()
    evaluator.process([video], outputs)
    assert evaluator.evaluate()["segm"]["AP"] == pytest.approx(100)
    evaluator.reset()
    assert evaluator.evaluate()["segm"]["AP"] == 0
    with pytest.raises(ValueError, match="2 videos at once"):
        evaluator.process([video, video], outputs)


@needs_detectron2
def test_registered_frames_go_through_the_stock_mapper(ours, cfg, videos):
    from detectron2.data import DatasetCatalog, DatasetMapper

    ours.register_frames("ours_mapped", videos)
    cfg.INPUT.MIN_SIZE_TRAIN = (40,)
    mapped = DatasetMapper(cfg, is_train=True)(DatasetCatalog.get("ours_mapped")[0])
    assert mapped["image"].shape == (3, 40, 56)
    assert mapped["instances"].gt_masks.tensor.sum() == 22 * 30
