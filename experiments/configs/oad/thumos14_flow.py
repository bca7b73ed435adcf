"""THUMOS'14 with optical flow beside the encoder: TSN features from TeSTra's release."""

_base_ = ["thumos14.py"]

data = {"motion": "flow_kinetics_bninception"}
