"""Images that come twice, and what pre-training must not see: fingerprints, search, leakage."""
