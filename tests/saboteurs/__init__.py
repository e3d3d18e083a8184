"""Wrong libraries, each a small patch of the right one at a single seam.

The chapters must notice every one of them: a check that no saboteur makes
fail is an empty check. A saboteur is a function that takes a pytest
`MonkeyPatch`; its docstring says in one sentence what it does. One file
holds those of a chapter, and every file of this folder is read.

There are three seams, so that the library stays free to change inside:

* `replace` puts another function in the place of a public one;
* `kernel` puts another kernel in the place of one of `softmaxlib._kernels`,
  which the library looks up by name at every call;
* `check` puts another argument check in the place of the right one.

A wrong kernel calls the right one, `right(name)`, and spoils what it wrote,
or is written out from the formulas in `saboteurs.plain`.
"""

import importlib
import pkgutil
import sys
from collections.abc import Callable

import softmaxlib
from softmaxlib import _check, _kernels

SABOTEURS: dict[str, Callable] = {}


def saboteur(chapter: str) -> Callable[[Callable], Callable]:
    """Register a saboteur, with the chapter that should notice it first."""

    def register(function):
        name = function.__name__
        if name in SABOTEURS:
            raise ValueError(f"there are two saboteurs {name!r}")
        function.chapter = chapter
        SABOTEURS[name] = function
        return function

    return register


# --- seams ---------------------------------------------------------------


def replace(patch, name: str, function: Callable) -> None:
    """Put `function` in the place of a public function, or of a method.

    Wherever a module of softmaxlib holds the public object under any name,
    so that modules that use each other see the wrong one, too. The name of
    a method has a dot: "SoftmaxRegression.fit".
    """
    owner, _, method = name.rpartition(".")
    if owner:
        patch.setattr(getattr(softmaxlib, owner), method, function)
    else:
        _rebind(patch, getattr(softmaxlib, name), function)


def right(name: str) -> Callable:
    """The kernel that the library would call now, as one that writes."""
    kernel = getattr(_kernels, name)

    def writes(*arguments):
        *given, out = arguments
        out.copy_(kernel(*given))

    return writes


def kernel(patch, name: str, function: Callable) -> None:
    """Put `function` in the place of the kernel `name`.

    The arguments of the kernels, on checked plain tensors (the mask is None
    or boolean of the shape of x, dim is not negative, the temperature lies
    in [0, inf]); each writes its result into its last argument:

    * softmax, log_softmax, logsumexp, logsumexp_gradient:
      (x, mask, dim, temperature, out); that of logsumexp keeps dim, of
      size 1;
    * softmax_vjp (y, v, mask, dim, temperature, out), from the output y;
      log_softmax_vjp (x, v, mask, dim, temperature, out), from the input;
    * softmax_jvp (x, v, dim, temperature, out);
      softmax_hvp (x, u, v, dim, temperature, out);
    * softmax_jacobian, log_softmax_jacobian, softmax_hessian:
      (x, dim, temperature, out), with the classes at the end of `out`;
    * loss (x, target, weight, dim, smoothing, out) for each row, in
      float64; loss_gradient (x, target, weight, share, dim, smoothing,
      out). The target holds class indices (dim of size 1) or
      probabilities, weight is None or float64 of the shape of x, share is
      a factor a row, and a share of 0 gives 0.
    """
    kernel = getattr(_kernels, name)

    def wrong(*arguments, out=None):
        result = kernel(*arguments)
        function(*arguments, result)
        return result if out is None else out.copy_(result.view(out.shape))

    patch.setattr(_kernels, name, wrong)


def check(patch, name: str, function: Callable) -> None:
    """Put `function` in the place of an argument check.

    That is `dimension(function, dim, ndim)` or `temperature(function,
    value)`, where the first argument is the name of the public function.
    """
    _rebind(patch, right_check(name), function)


def right_check(name: str) -> Callable:
    """The argument check that the library would call now."""
    return getattr(_check, name)


def _rebind(patch, right: Callable, wrong: Callable) -> None:
    for name, module in list(sys.modules.items()):
        if name == "softmaxlib" or name.startswith("softmaxlib."):
            for key, value in list(vars(module).items()):
                if value is right:
                    patch.setattr(module, key, wrong)


# --- the files of this folder --------------------------------------------

for _file in sorted(m.name for m in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_file}")
