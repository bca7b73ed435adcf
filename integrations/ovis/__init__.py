"""Online video instance segmentation: ViT-Adapter, Mask2Former and CTVIS on a frozen encoder."""
