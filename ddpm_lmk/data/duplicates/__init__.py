"""Near-duplicate search and data leakage: image fingerprints, the search, what a run leaves out, what a score says."""
