"""Fused operations, each with its plain twin."""
