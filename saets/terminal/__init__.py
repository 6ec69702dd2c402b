"""How work says how far it is, how that looks, and what is kept off the terminal."""
