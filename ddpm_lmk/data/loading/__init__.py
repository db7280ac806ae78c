"""From packed shards to batches: order, augmentation, the torch and the DALI loader."""
