"""Command line of the generator: ``python -m hf_lopt.meta.construct --help``."""

from hf_lopt.meta.construct import BUILDERS
from hf_lopt.meta.construct.files import main


if __name__ == "__main__":
    raise SystemExit(main(BUILDERS))
