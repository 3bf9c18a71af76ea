"""The methods: each is a class with ``step`` in one file of this folder, and a row of ``METHODS``.

The attributes of the class (``methods/method.py``) say which flags have an effect.
"""

from methods.mpl import MPL
from methods.pseudo_label import PseudoLabel
from methods.reduced import ReducedMPL
from methods.semimeta import SemiMeta
from methods.supervised import Supervised
from methods.uda import UDA, FixMatch

METHODS = {  # the names are the choices of --method
    "supervised": Supervised,
    "uda": UDA,
    "fixmatch": FixMatch,
    "pseudo-label": PseudoLabel,
    "mpl": MPL,
    "reduced-mpl": ReducedMPL,
    "semimeta": SemiMeta,
}
