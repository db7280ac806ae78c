"""Landmarks as other tools write them, read and written: one module for each, with how it counts pixels."""
