"""Wrong libraries for the chapter on the axioms of probability."""

from saboteurs import kernel, right, saboteur

CHAPTER = "03_axioms"


@saboteur(CHAPTER)
def mask_after_exp(patch):
    """Zeroes masked entries after the sum, without renormalising."""
    empty = {"softmax": 0.0, "log_softmax": float("-inf")}
    for name in ("softmax", "log_softmax", "logsumexp"):
        known = right(name)

        def wrong(x, mask, dim, temperature, out, known=known, name=name):
            known(x, None, dim, temperature, out)
            if mask is not None and name in empty:
                out.masked_fill_(~mask, empty[name])

        kernel(patch, name, wrong)
