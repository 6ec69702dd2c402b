"""A page that shows what vectors do to features, as `saets explorer` writes it."""
