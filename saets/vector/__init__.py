"""The steering vector: its file and arithmetic, the positions it steers, a model steered by it, files of other tools."""
