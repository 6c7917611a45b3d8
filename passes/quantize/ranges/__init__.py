"""Which real numbers a quantized tensor can hold: what is observed, and how a range is chosen from it."""
