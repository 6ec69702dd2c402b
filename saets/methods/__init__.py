"""The steering formulas and the mathematics that they share."""
