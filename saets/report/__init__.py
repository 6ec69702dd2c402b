"""What a run found as one HTML file that needs nothing else: `contents` gathers it, `page` writes it."""
