"""Passes that make the integers more faithful: equalization, bias correction, learned rounding, smoothing."""
