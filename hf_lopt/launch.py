"""``accelerate launch -m hf_lopt.launch script.py ...``: see :mod:`hf_lopt.hf.launch`."""

from hf_lopt.hf.launch import main


if __name__ == "__main__":
    main()
