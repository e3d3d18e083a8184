"""softmaxlib: the softmax function, its derivatives and its numerics.

The library of a book in which every claim is run; each function names the
chapter that derives it. The public names are those of the modules below.
"""

from softmaxlib import (
    calibration,
    derivatives,
    functional,
    loss,
    modules,
    regression,
    sampling,
)
from softmaxlib.calibration import *
from softmaxlib.derivatives import *
from softmaxlib.functional import *
from softmaxlib.loss import *
from softmaxlib.modules import *
from softmaxlib.regression import *
from softmaxlib.sampling import *

__all__: list[str] = []
__all__ += calibration.__all__
__all__ += derivatives.__all__
__all__ += functional.__all__
__all__ += loss.__all__
__all__ += modules.__all__
__all__ += regression.__all__
__all__ += sampling.__all__
__version__ = "0.1.0"
