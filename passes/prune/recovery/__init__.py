"""Accuracy after pruning, without labels: statistics, least squares, training towards the original."""
