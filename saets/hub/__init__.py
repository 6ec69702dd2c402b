"""The Hugging Face hub, the files that the method's authors published there, and the card of a pushed run."""
