"""Prints what a script sees of itself, as JSON."""

import json
import sys


print(json.dumps({"name": __name__, "argv": sys.argv, "path": sys.path[0], "registered": "hf_lopt" in sys.modules}))
if __name__ == "__main__" and "--fail" in sys.argv:
    sys.exit(3)
