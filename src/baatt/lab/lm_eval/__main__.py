"""`python -m baatt.lab.lm_eval ...`: lm-evaluation-harness's command line with the model `baatt_llada`.

In: the arguments of `lm_eval`. Out: what that command prints and writes. Registers the model first, because version
0.4.13 of the harness finds no models of other packages by itself; nothing else is changed.
"""

import logging

from baatt.lab.ranks import leave_process_group


def main() -> None:
    """Run the harness, and show this package's messages beside its own: the settings belong to the results."""
    import baatt.lab.lm_eval.model  # noqa: F401, I001  (first: registers the model, or names the extra)
    from lm_eval.__main__ import cli_evaluate

    logging.basicConfig(format="%(asctime)s %(levelname)-8s [%(name)s] %(message)s")
    logging.getLogger("baatt").setLevel(logging.INFO)
    try:
        cli_evaluate()
    finally:
        leave_process_group()


if __name__ == "__main__":
    main()
