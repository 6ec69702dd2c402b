"""How what the `smollm2` preset ships is made, one part a module; `build_assets.py` is the command."""
