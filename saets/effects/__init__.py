"""What vectors do to SAE features: which vectors, at which scale, and the worker that measures them."""
