"""``python -m hf_lopt.meta {train,evaluate,export}``: see docs/meta_training.md."""

from hf_lopt.meta.cli import main


if __name__ == "__main__":
    raise SystemExit(main())
