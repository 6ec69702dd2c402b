"""`saets` for `ray submit`, which copies one file to the head and runs it there: the same words, on the cluster of that head.

    ray submit cluster/aws.yaml scripts/pipeline.py -- run gemma-2-2b --out s3://bucket/gemma-2-2b

RAY_ADDRESS may name another cluster. Submitted again with the same words it goes on where it was stopped.
`ray submit` takes one level of quotes away: a value with quotes or spaces in it needs two.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("RAY_ADDRESS", "auto")

from saets.cli import main

if __name__ == "__main__":
    sys.exit(main())
