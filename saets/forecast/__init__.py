"""Effects predicted before anything is generated, and what stands behind a prediction."""
