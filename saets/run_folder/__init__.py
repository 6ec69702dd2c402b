"""The run folder: what lies in it, what comes with an experiment, and what of it a fit reads."""
