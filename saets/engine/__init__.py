"""The rollout engine: steered text for many vectors at once, what it does to the residual stream, and at which scale.

Needs torch, transformers and numpy, and of this package only the names on the ground (`errors`, `hooks`, `shapes`, `tokens`), so
that it runs and is benchmarked on a bare GPU machine. `reference` is the published algorithm, which everything here is tested
against.
"""
