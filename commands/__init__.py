"""The commands of `fxpress`, one file for each group; `cli.py` lists them."""
