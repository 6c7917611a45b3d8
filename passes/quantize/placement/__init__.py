"""What is computed on integers and what in float, beyond the table: by what it costs in accuracy, or in time."""
