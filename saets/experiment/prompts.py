"""What the paper's rollouts begin with."""

PAPER_PROMPTS = (
    *("", "", "", "I think", "Breaking news", "Last night", "For sale", "The weather", "Dear Sir/Madam"),
    *("Preheat the oven", "It's interesting that", "Assistant:", "I went up to", "New study suggests"),
)
"""The 14 prompts; the empty one (BOS alone) stands three times."""
