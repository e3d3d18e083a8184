"""Draws from logits: sample() against PyTorch and NumPy, per call."""

import numpy as np
import torch

from benchmarks.measure import digits, paired, seconds, table
from softmaxlib.sampling import gumbel_max, gumbel_top_k, sample

DRAWS = (100, 1000, 10_000, 100_000)
CLASSES = (5, 1000, 131_072)
# Rows and classes of batches from which one draw a row is made.
BATCHES = ((1, 1000), (64, 10), (512, 1000), (64, 50_000))
# Noise for every draw and class: beyond this many, seconds a call.
MOST_NOISE = 10**7
# Logits: five equal ones, those of the book's figure, and normal ones. A
# binary search is the slower the less predictable its branches.
FLAT, BOOK = "5 equal", "5 of the book"


def logits(classes):
    if classes == FLAT:
        return torch.zeros(5)
    if classes == BOOK:
        return torch.tensor([2.0, 1.0, 3.0, 5.0, 4.0])
    generator = torch.Generator().manual_seed(0)
    return torch.randn(classes, generator=generator)


def candidates(z, draws):
    """The peers, each from logits of its own library to class indices."""
    rng = np.random.default_rng(0)
    array = z.numpy()

    def multinomial():
        return torch.multinomial(torch.softmax(z, 0), draws, True)

    def categorical():
        return torch.distributions.Categorical(logits=z).sample((draws,))

    def choice():
        # In float64, lest choice() find that the sum is not 1.
        wide = array.astype(np.float64)
        w = np.exp(wide - wide.max())
        return rng.choice(len(w), draws, p=w / w.sum())

    def searchsorted():
        w = np.exp(array - array.max())
        sums = w.cumsum(dtype=np.float64)
        u = rng.random(draws) * sums[-1]
        return sums.searchsorted(u, side="right")

    def gumbel():
        noise = rng.gumbel(size=(draws, len(array)))
        return (array + noise).argmax(1)

    peers = {
        "multinomial": multinomial,
        "Categorical": categorical,
        "choice": choice,
        "searchsorted": searchsorted,
    }
    if draws * len(z) <= MOST_NOISE:
        peers["Gumbel"] = gumbel
    return peers


NAMES = ("multinomial", "Categorical", "choice", "searchsorted", "Gumbel")


def draws_table():
    rows = []
    for draws in DRAWS:
        for classes in (FLAT, BOOK, *CLASSES):
            z = logits(classes)
            peers = candidates(z, draws)
            found = {
                name: paired(
                    lambda z=z, n=draws: sample(z, n), peer, repeats=31
                )
                for name, peer in peers.items()
            }
            ours = min(ratio.ours for ratio in found.values())
            best = min(found.values(), key=lambda ratio: ratio.median)
            kind = f"{classes:,}" if isinstance(classes, int) else classes
            rows.append(
                [
                    f"{draws:,}",
                    kind,
                    seconds(ours),
                    f"**{best}**",
                    *(
                        digits(found[name].median) if name in found else ""
                        for name in NAMES
                    ),
                ]
            )
    header = ["draws", "classes", "sample()", "fastest peer", *NAMES]
    return table(header, rows)


def batch_table():
    """One draw a row, at two temperatures, against PyTorch's."""
    rows = []
    for shape in BATCHES:
        z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for temperature in (1.0, 0.7):

            def ours(z=z, temperature=temperature):
                return sample(z, 1, temperature=temperature)

            def scaled(z=z, temperature=temperature):
                return z if temperature == 1 else z / temperature

            def multinomial(scaled=scaled):
                return torch.multinomial(torch.softmax(scaled(), -1), 1)

            def categorical(scaled=scaled):
                peer = torch.distributions.Categorical(logits=scaled())
                return peer.sample()

            found = [
                paired(ours, peer, repeats=15)
                for peer in (multinomial, categorical)
            ]
            name = f"{shape[0]:,} × {shape[1]:,}"
            time = seconds(min(ratio.ours for ratio in found))
            rows.append([name, temperature, time, *found])
    return table(["batch", "T", "sample()", *NAMES[:2]], rows)


def others_table():
    """gumbel_max against NumPy's, top-k against multinomial's."""
    rows = []
    for classes in CLASSES[:2]:
        z = logits(classes)
        peer = candidates(z, 1000)["Gumbel"]
        ratio = paired(lambda z=z: gumbel_max(z, 1000), peer)
        rows.append(
            ["gumbel_max, 1,000 draws", f"{classes:,}", "NumPy", ratio]
        )
    for classes in CLASSES:
        z = logits(classes).expand(64, -1).contiguous()
        ratio = paired(
            lambda z=z: gumbel_top_k(z, 3),
            lambda z=z: torch.multinomial(torch.softmax(z, -1), 3),
        )
        peer = "torch.multinomial"
        rows.append(
            ["gumbel_top_k, 3 of 64 rows", f"{classes:,}", peer, ratio]
        )
    return table(["what", "classes", "peer", "times faster"], rows)


def report() -> str:
    """All measurements, as Markdown."""
    return "\n\n".join(
        [
            "## Sampling",
            "CPU time of the peer over that of `softmaxlib`, on one thread, "
            "from float32 logits to class indices: median [quartiles] of "
            "pairs taken in turns; above 1, `softmaxlib` is faster. The "
            "peers are `torch.multinomial(torch.softmax(z, 0), n, True)`, "
            "`torch.distributions.Categorical(logits=z).sample((n,))`, and in "
            "NumPy, from arrays: `rng.choice(p=...)`, a hand-written search "
            "of the cumulative sum, and the arg max of Gumbel noise.",
            "`sample()` is plain inversion: for many draws from one row its "
            "time is that of uniform numbers and binary searches, which the "
            "peers need as well, and for few draws that of a dozen calls and "
            "the checks. There `torch.multinomial` is the faster one: it "
            "keeps its sums in the format of the probabilities, where "
            "`sample()` adds them up in float64.",
            draws_table(),
            "One draw from each row of a batch, where `torch.multinomial` "
            "draws a number for every class and `sample()` one for every "
            "row:",
            batch_table(),
            "Noise for every class, in float64, and draws without "
            "replacement:",
            others_table(),
        ]
    )


if __name__ == "__main__":
    print(report())
