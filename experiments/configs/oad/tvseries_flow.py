"""TVSeries with optical flow beside the encoder: TSN features from TeSTra's release."""

_base_ = ["tvseries.py"]

data = {"motion": "flow_kinetics_bninception"}
