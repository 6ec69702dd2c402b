"""An experiment: its settings, its goals, and how both are found and read."""
