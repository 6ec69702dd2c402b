"""Files: paths and object stores alike, one writer a folder, tensors."""
