"""Read by every Python process of the tests as it starts, Ray's among them, since `scripts/test` puts this folder on PYTHONPATH.

Importing what runs a model makes half a million objects, through which the collector goes again and again for a fifth of the
time; hundreds of processes do so.
"""

import gc

gc.set_threshold(200_000, 50, 1000)
