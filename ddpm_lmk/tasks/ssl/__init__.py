"""The self-supervised baselines: MoCo v3, SimCLR v2, DINO."""
