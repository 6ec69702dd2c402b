"""How many rollouts a vector are enough, and how long: fits to effects that cost the same number of tokens.

    python scripts/study_rollouts.py [--work build/assets] [--set section.key=value] ... [--skip SOURCE] ...

Many vectors measured by few rollouts, or few by many: each fit is scored on the same other vectors, which are measured by the
paper's 896 rollouts of 32 tokens. The study is the part `rollouts` of `build_assets.py`, whose settings these are too
(`rollouts.tokens`, `rollouts.each`, `rollouts.lengths`), and can be stopped and gone on with. The last line is one JSON object.

`explained` is the share of the squared effects that a fit predicts, 1 - mse / mse_zero. It has one denominator for all fits; R2
has not, since it compares a fit with the mean effect of its own vectors, which is poor where they are few. `at most` is what the
noise of the other vectors leaves to be predicted.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from build_assets import add_options, build_of

from saets.errors import InputError


def main() -> None:
    """Run the study and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    given = parser.parse_args()
    try:
        build = build_of(given)
        build.make(["rollouts"])
    except InputError as error:
        sys.exit(f"study_rollouts: {error}")
    facts = build.facts("rollouts")
    print(f"{'a vector':28} {'vectors':>8} {'explained':>9} {'at most':>8} {'cosine':>8} {'penalty':>9}")
    for name, found in facts["fits"].items():
        explained, most = (1 - found[error] / found["mse_zero"] for error in ("mse", "mse_noise"))
        print(f"{name:28} {found['vectors']:8} {explained:9.4f} {most:8.4f} {found['cosine']:8.4f} {found['penalty']:9.3g}")
    print(json.dumps({name: facts[name] for name in ("tokens", "fits", "runs")}))


if __name__ == "__main__":
    main()
