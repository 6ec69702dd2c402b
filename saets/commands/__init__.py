"""The commands, a module for those that belong together; each adds its own to the parser."""
