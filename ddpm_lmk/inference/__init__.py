"""Using a finished run: score, predict, calibrate, sample, export."""
