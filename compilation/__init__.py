"""One compilation, from a captured program to a verified artifact: its settings, its steps, its promises."""
