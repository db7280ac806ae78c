"""Landmarks as other tools write them, read and written: one module for each, with its convention of pixels."""
