"""The linear map from vectors to effects, and how well it does on vectors that it has not seen."""
