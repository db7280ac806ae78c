"""ddpm-lmk: diffusion pre-training on pooled x-rays, and few-shot landmark detection with the same engine."""

__version__ = "0.2.0"
