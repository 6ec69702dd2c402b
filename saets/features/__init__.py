"""SAE features: what they fire on, what boosting them does, and which of them belong to a goal."""
