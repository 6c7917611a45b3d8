"""What goes: criteria by weights, activations or gradients, and how coupled places agree."""
