"""Finds, loads and checks the meta-trained weights of a rule, and says where they came from; saves and uploads them.

`load` takes what a user writes as `weights=` and returns `Weights`; `find` lists what is on this machine. `save` and
`push_to_hub` are the other direction. `PUBLISHED` names the sets on the Hugging Face hub, `EMBEDDED` is the folder of
those in the package.
"""

from hf_lopt.weights.formats import content_sha256
from hf_lopt.weights.loading import EMBEDDED, Weights, find, load
from hf_lopt.weights.once_embedded import earlier
from hf_lopt.weights.publish import push_to_hub, save
from hf_lopt.weights.published import PUBLISHED, Published


__all__ = [
    "EMBEDDED",
    "PUBLISHED",
    "Published",
    "Weights",
    "content_sha256",
    "earlier",
    "find",
    "load",
    "push_to_hub",
    "save",
]
