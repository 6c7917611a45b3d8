"""Other kinds in the same plan: single weights, n of m, hidden units, residual blocks."""
