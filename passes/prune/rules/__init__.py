"""How each operator relates the dimensions of its inputs and outputs; `table.py` has them all."""
