"""The published three stages on the published data, evaluated on Video-MME and MLVU.

    data.root/LLaVA-Pretrain/{blip_laion_cc_sbu_558k.json,images/}
    data.root/LLaVA-NeXT-Data/llava_next_raw_format/*.json and the images beside them
    data.root/LLaVA-Video-178K/<split>/{*cap*.json,*oe*.json,*mc*.json} and the videos beside them

Of LLaVA-Video-178K the splits up to a minute, the first tenth of each file. Both towers are seen at
their last layer, after the final norm; ``released`` has the pairing of the published comparison.
"""

_base_ = ["_base.py"]

_videos = "{root}/LLaVA-Video-178K"
_splits = ["0_30_s_academic_v0_1", "0_30_s_youtube_v0_1", "30_60_s_academic_v0_1",
           "30_60_s_youtube_v0_1"]  # fmt: skip

model = {"llm": "lmsys/vicuna-7b-v1.5", "merge_type": "spatial_unpad"}

stages = {
    "align": {
        "recipe": "align",
        "data": [
            {
                "json": "{root}/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
                "root": "{root}/LLaVA-Pretrain/images",
            }
        ],
    },
    "image": {
        "recipe": "image",
        "data": [
            {
                "json": "{root}/LLaVA-NeXT-Data/llava_next_raw_format/*.json",
                "root": "{root}/LLaVA-NeXT-Data/llava_next_raw_format",
            }
        ],
    },
    "video": {
        "recipe": "video",
        "data": [
            {
                "json": f"{_videos}/{split}/*.json",
                "root": f"{_videos}/{split}",
                "share": "first:10%",
            }
            for split in _splits
        ],
    },
}

eval = {
    "tasks": ["videomme", "mlvu_dev"],
    "model_args": {"force_sample": False},  # as the released evaluation: short videos, few frames
    "live_window": 64,
}
