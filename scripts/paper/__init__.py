"""The paper's experiment on a model that anyone can run: what is tried, how it is carried out, what it shows."""
