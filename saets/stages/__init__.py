"""The stages of a run: each reads the run folder, computes only what is missing there, and writes it back."""
